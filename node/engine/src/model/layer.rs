//! A layer's weights, and what is computed with some of them at a time.
//!
//! What a family does not have is absent here; nothing else knows of families.

use millrace_shared::model::{Features, ModelConfig};

use super::{Backend, LoadedPart, LoadedParts};
use crate::{LoadError, StageSpec};

/// Loaded parts, in the order in which they were asked for.
pub(super) struct Parts<B: Backend>(std::vec::IntoIter<LoadedPart<B::Weight, B::Vector>>);

impl<B: Backend> Parts<B> {
    pub(super) fn new(parts: LoadedParts<B::Weight, B::Vector>) -> Self {
        Self(parts.into_iter())
    }

    pub(super) fn vector(&mut self) -> B::Vector {
        match self.0.next() {
            Some(LoadedPart::Vector(vector)) => vector,
            _ => unreachable!("parts come back in the order in which they were asked for"),
        }
    }

    pub(super) fn matrices(&mut self) -> B::Weight {
        match self.0.next() {
            Some(LoadedPart::Matrices(matrices)) => matrices,
            _ => unreachable!("parts come back in the order in which they were asked for"),
        }
    }
}

/// A norm, by the root of the mean square, or, with a bias, of what differs from the mean.
pub(super) struct Norm<B: Backend> {
    gain: B::Vector,
    bias: Option<B::Vector>,
}

impl<B: Backend> Norm<B> {
    pub(super) fn load(parts: &mut Parts<B>, f: &Features) -> Self {
        Self { gain: parts.vector(), bias: f.layer_norm.then(|| parts.vector()) }
    }

    pub(super) fn apply(&self, b: &mut B, x: &B::Tensor, eps: f32, out: &mut B::Tensor) {
        match &self.bias {
            None => b.rms_norm(x, &self.gain, eps, out),
            Some(bias) => b.layer_norm(x, &self.gain, bias, eps, out),
        }
    }
}

/// Activations between factored matrices, for each rank.
pub(super) struct Between<B: Backend>(Vec<(u64, B::Tensor)>);

impl<B: Backend> Between<B> {
    /// # Errors
    /// If memory runs out.
    pub(super) fn new(b: &mut B, ranks: &[u64], n: usize) -> Result<Self, LoadError> {
        let room = |&rank: &u64| Ok((rank, b.tensor(n, rank as usize, true)?));
        ranks.iter().map(room).collect::<Result<_, _>>().map(Self)
    }
}

/// Matrices that share their input; factored ones have a thin matrix before them.
pub(super) struct Product<B: Backend> {
    /// And its rank.
    inner: Option<(B::Weight, u64)>,
    /// One below the other.
    pub(super) matrices: B::Weight,
}

impl<B: Backend> Product<B> {
    fn load(parts: &mut Parts<B>, rank: Option<u64>) -> Self {
        Self { inner: rank.map(|rank| (parts.matrices(), rank)), matrices: parts.matrices() }
    }

    /// What the matrices are applied to: the input, or what the thin one makes of it.
    pub(super) fn input<'t>(
        &self,
        b: &mut B,
        x: &'t B::Tensor,
        between: &'t mut Between<B>,
    ) -> &'t B::Tensor {
        let Some((inner, rank)) = &self.inner else { return x };
        let room = between.0.iter_mut().find(|(known, _)| known == rank);
        let (_, room) = room.expect("invariant: there is room for each rank");
        b.linear_input(x, inner, room);
        room
    }
}

/// What a part of a layer ends with: back to the residual stream.
pub(super) struct Output<B: Backend> {
    product: Product<B>,
    bias: Option<B::Vector>,
}

impl<B: Backend> Output<B> {
    fn load(parts: &mut Parts<B>, f: &Features, rank: Option<u64>) -> Self {
        let product = Product::load(parts, rank);
        Self { product, bias: f.biases.then(|| parts.vector()) }
    }

    /// `x += w input + bias`, what is added being normalised first where there is a gain.
    pub(super) fn add(
        &self,
        b: &mut B,
        (input, between): (&B::Tensor, &mut Between<B>),
        (gain, eps): (&Option<B::Vector>, f32),
        (branch, x): (&mut Option<B::Tensor>, &mut B::Tensor),
    ) {
        let input = self.product.input(b, input, between);
        let matrices = &self.product.matrices;
        match (gain, branch) {
            (Some(gain), Some(branch)) => {
                b.linear(input, matrices, branch);
                if let Some(bias) = &self.bias {
                    b.add_bias(branch, 0, bias);
                }
                b.rms_norm_add(branch, gain, eps, x);
            }
            _ => {
                b.linear_add(input, matrices, x);
                if let Some(bias) = &self.bias {
                    b.add_bias(x, 0, bias);
                }
            }
        }
    }
}

/// The feed-forward part.
pub(super) enum FeedForward<B: Backend> {
    /// `gate | up`, and `down`.
    Gated(Product<B>, Output<B>),
    /// `up` and its bias, and `down`.
    Plain(Product<B>, Option<B::Vector>, Output<B>),
    /// Experts.
    Mixture(Mixture<B>),
}

/// Experts and their router.
pub(super) struct Mixture<B: Backend> {
    /// A score for each expert, and the shared one's gate.
    router: B::Weight,
    /// `gate | up`, and `down`.
    experts: Vec<[B::Weight; 2]>,
    /// The one for all rows.
    shared: Option<[B::Weight; 2]>,
}

/// Room for the feed-forward part of a step of `n` rows.
pub(super) struct Room<B: Backend> {
    /// `n x ffn`, or as wide as the shared expert.
    act: B::Tensor,
    /// Scores and gates of the router, `n x (experts + 1)`, and what else experts need.
    routed: Option<(B::Tensor, B::Routes)>,
}

impl<B: Backend> Room<B> {
    /// # Errors
    /// If memory runs out.
    pub(super) fn new(b: &mut B, c: &ModelConfig, n: usize) -> Result<Self, LoadError> {
        let Some(experts) = &c.features.experts else {
            return Ok(Self { act: b.tensor(n, c.ffn as usize, true)?, routed: None });
        };
        let scores = experts.count + u32::from(experts.shared_ffn > 0);
        let scores = b.tensor(n, scores as usize, false)?;
        let routes = b.routes(n, c.hidden as usize, c.ffn as usize, experts)?;
        let act = b.tensor(n, experts.shared_ffn as usize, true)?;
        Ok(Self { act, routed: Some((scores, routes)) })
    }
}

/// One layer's weights.
pub(super) struct Layer<B: Backend> {
    pub(super) attn_norm: Norm<B>,
    /// `q | k | v`.
    pub(super) qkv: Product<B>,
    /// Where they begin, and biases.
    pub(super) biases: Vec<(usize, B::Vector)>,
    /// Of query and key heads.
    pub(super) head_norms: Option<[B::Vector; 2]>,
    pub(super) attn_output: Output<B>,
    pub(super) attn_post_norm: Option<B::Vector>,
    pub(super) ffn_norm: Norm<B>,
    pub(super) feed_forward: FeedForward<B>,
    pub(super) ffn_post_norm: Option<B::Vector>,
}

impl<B: Backend> Layer<B> {
    /// In the order of `Sources::layer`; `rank` tells that of factored matrices by the first one's name.
    pub(super) fn load(
        parts: &mut Parts<B>,
        spec: &StageSpec,
        rank: &dyn Fn(&str) -> Option<u64>,
    ) -> Self {
        let c = &spec.config;
        let f = &c.features;
        let queries = (c.heads * c.head_dim) as usize;
        let keys = (c.kv_heads * c.head_dim) as usize;
        let places: &[usize] = match (f.qkv_bias || f.biases, f.fused_qkv) {
            (false, _) => &[],
            (true, true) => &[0],
            (true, false) => &[0, queries, queries + keys],
        };
        Self {
            attn_norm: Norm::load(parts, f),
            qkv: Product::load(parts, rank(if f.fused_qkv { "attn_qkv" } else { "attn_q" })),
            biases: places.iter().map(|&at| (at, parts.vector())).collect(),
            head_norms: f.qk_norm.then(|| std::array::from_fn(|_| parts.vector())),
            attn_output: Output::load(parts, f, rank("attn_output")),
            attn_post_norm: f.post_norms.then(|| parts.vector()),
            ffn_norm: Norm::load(parts, f),
            feed_forward: FeedForward::load(parts, f, rank),
            ffn_post_norm: f.post_norms.then(|| parts.vector()),
        }
    }
}

impl<B: Backend> FeedForward<B> {
    fn load(parts: &mut Parts<B>, f: &Features, rank: &dyn Fn(&str) -> Option<u64>) -> Self {
        let Some(experts) = &f.experts else {
            let down = rank("ffn_down");
            if f.ungated {
                let up = Product::load(parts, rank("ffn_up"));
                let bias = f.biases.then(|| parts.vector());
                return Self::Plain(up, bias, Output::load(parts, f, down));
            }
            let gate_up = Product::load(parts, rank("ffn_gate"));
            return Self::Gated(gate_up, Output::load(parts, f, down));
        };
        let router = parts.matrices();
        let mut pair = || [parts.matrices(), parts.matrices()];
        let all = (0..experts.count).map(|_| pair()).collect();
        let shared = (experts.shared_ffn > 0).then(pair);
        Self::Mixture(Mixture { router, experts: all, shared })
    }

    /// `x` plus what this part makes of `normed`, normalised first where there is a gain.
    pub(super) fn add(
        &self,
        b: &mut B,
        (normed, between): (&B::Tensor, &mut Between<B>),
        c: &ModelConfig,
        room: &mut Room<B>,
        gain: &Option<B::Vector>,
        (branch, x): (&mut Option<B::Tensor>, &mut B::Tensor),
    ) {
        let f = &c.features;
        let down = match self {
            Self::Gated(gate_up, down) => {
                let input = gate_up.input(b, normed, between);
                b.gated(input, &gate_up.matrices, f.activation, &mut room.act);
                down
            }
            Self::Plain(up, bias, down) => {
                let input = up.input(b, normed, between);
                b.linear(input, &up.matrices, &mut room.act);
                b.activate(&mut room.act, bias.as_ref(), f.activation);
                down
            }
            Self::Mixture(mixture) => return mixture.add(b, normed, f, room, (branch, x)),
        };
        down.add(b, (&room.act, between), (gain, c.rms_eps), (branch, x));
    }
}

impl<B: Backend> Mixture<B> {
    fn add(
        &self,
        b: &mut B,
        normed: &B::Tensor,
        f: &Features,
        room: &mut Room<B>,
        (branch, x): (&mut Option<B::Tensor>, &mut B::Tensor),
    ) {
        let (Some(experts), Some((scores, routes))) = (&f.experts, &mut room.routed) else {
            unreachable!("a layer of experts has room for them")
        };
        b.linear(normed, &self.router, scores);
        let weights = |expert: usize| self.experts[expert].each_ref();
        b.experts(normed, scores, &weights, (experts, f.activation), routes, x);
        if let (Some([gate_up, down]), Some(branch)) = (&self.shared, branch) {
            b.gated(normed, gate_up, f.activation, &mut room.act);
            b.linear(&room.act, down, branch);
            b.add_gated(branch, scores, experts.count as usize, x);
        }
    }
}
