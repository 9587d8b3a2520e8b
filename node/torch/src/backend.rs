//! What the operations of the torch backend share: the device, the step at hand, what went wrong.
//!
//! Operations cannot fail as the model definition sees them. The first error of libtorch is kept, what
//! follows does nothing, and the engine ends the step with it ([`TorchBackend::end_step`]). The residual
//! stream, what a head sees and logits are f32; the others are of the type that is computed in.

use std::ops::Range;

use millrace_engine::LoadError;
use millrace_engine::model::{Batch, BlockTables};
use millrace_shared::model::{Activation, RopeConfig};
use tch::{Kind, TchError, Tensor};

use crate::Place;
use crate::attention::Rope;
use crate::graphs::{Fixed, Geometry, Graphs, Recorder};
use crate::matrix::Matrix;
use crate::shim::{Shim, pinned};
use crate::step::Step;

/// Activations: as many rows as were last written.
#[derive(Debug)]
pub struct Activations {
    pub(crate) data: Tensor,
    pub(crate) width: i64,
    /// Logits on their way to the sampler.
    pub(crate) host: Vec<f32>,
}

/// Arithmetic and memory of one stage.
#[derive(Debug)]
pub struct TorchBackend {
    pub(crate) place: Place,
    pub(crate) threads: usize,
    pub(crate) failure: Option<String>,
    /// Whether the rows that went no further were finite: on the device, read once a step.
    pub(crate) finite: Option<Tensor>,
    pub(crate) step: Step,
    pub(crate) weight_bytes: u64,
    pub(crate) kv_bytes: u64,
    /// Layers of the stage, and how often a step has looked whether all is finite.
    pub(crate) layers: usize,
    pub(crate) looked: usize,
    /// Decode steps as graphs, once the stage is loaded and where they can be.
    graphs: Option<Graphs>,
    pub(crate) geometry: Geometry,
    /// Whether the host must read in the middle of a step: which experts rows chose.
    pub(crate) host_reads: bool,
    /// Where activations come from the device to.
    pub(crate) landing: Option<Tensor>,
}

/// What went wrong, without libtorch's own stack.
fn reason(error: &TchError) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("Internal torch error: ").unwrap_or(line);
    match line.contains("out of memory") || line.contains("can't allocate memory") {
        true => format!(
            "the device is out of memory: use more stages, fewer KV blocks or a smaller \
             --torch-dtype, or stop what else runs there ({line})"
        ),
        false => line.to_owned(),
    }
}

/// An error while `what` is loaded, which takes so many bytes.
pub(crate) fn load_error(error: &TchError, what: &str, needed_bytes: u64) -> LoadError {
    let cause = reason(error);
    match cause.starts_with("the device is out of memory") {
        true => LoadError::OutOfMemory { what: "weights and KV cache", needed_bytes, cause },
        false => LoadError::Settings(format!("libtorch cannot hold {what}: {cause}")),
    }
}

impl TorchBackend {
    /// An empty backend.
    pub fn new(place: Place, threads: usize) -> Self {
        Self {
            place,
            threads,
            failure: None,
            finite: None,
            step: Step::default(),
            weight_bytes: 0,
            kv_bytes: 0,
            layers: 0,
            looked: 0,
            graphs: None,
            geometry: Geometry::default(),
            host_reads: false,
            landing: None,
        }
    }

    /// Bytes of weights and of the KV cache.
    pub fn bytes(&self) -> (u64, u64) {
        (self.weight_bytes, self.kv_bytes)
    }

    /// A step begins.
    pub fn begin_step(&mut self) {
        self.step.clear();
        self.failure = None;
        self.finite = None;
        self.looked = 0;
    }

    /// From here on decode steps are graphs, where the stage allows it.
    pub(crate) fn record(&mut self, recorder: Box<dyn Recorder>) {
        let graphs = || Graphs::new(recorder, self.geometry.clone(), self.place.device);
        self.graphs = (self.layers > 0 && !self.host_reads).then(graphs);
    }

    /// The step that has begun is one of a graph's sizes, if it can be. `whole`: the stage has the head.
    pub(crate) fn begin_graph(
        &mut self,
        batch: &Batch,
        tables: &BlockTables,
        (tokens, whole): (&[u32], bool),
    ) {
        let Some(graphs) = &mut self.graphs else { return };
        match graphs.begin(batch, tables, (tokens, whole)) {
            Ok(()) => graphs.fixed().into_iter().for_each(|fixed| self.step.begin_fixed(fixed)),
            Err(e) => self.failure = Some(e),
        }
    }

    /// Whether the step came to nothing because it could not be recorded: it is to run again, and will
    /// not be recorded.
    pub(crate) fn end_graph(&mut self) -> bool {
        self.graphs.as_mut().is_some_and(Graphs::end)
    }

    /// The inputs of the step's graph, if it is one.
    pub(crate) fn fixed(&self) -> Option<&Fixed> {
        self.graphs.as_ref()?.fixed()
    }

    /// What follows is recorded, or was. `hidden`: the step's activations, where it does not begin with
    /// tokens.
    pub(crate) fn enter(&mut self, hidden: Option<&[f32]>) {
        let Some(graphs) = self.graphs.as_mut().filter(|_| self.failure.is_none()) else { return };
        let put = hidden.map_or(Ok(()), |rows| graphs.put_hidden(rows));
        if let Err(e) = put.and_then(|()| graphs.enter()) {
            self.failure = Some(e);
        }
    }

    /// The last layer is through.
    pub(crate) fn leave(&mut self, x: &mut Activations) {
        let Some(graphs) = self.graphs.as_mut().filter(|_| self.failure.is_none()) else { return };
        match graphs.leave(&x.data) {
            Ok(data) => x.data = data,
            Err(e) => self.failure = Some(e),
        }
    }

    /// Whether operations come between the step's input and the result of a graph.
    pub(crate) fn is_inside(&self) -> bool {
        self.graphs.as_ref().is_some_and(Graphs::is_inside)
    }

    /// What failed in the step, if anything did.
    pub fn end_step(&mut self) -> Option<String> {
        self.step.clear();
        if let Some(finite) = self.finite.take() {
            self.attempt(|s| {
                if finite.f_int64_value(&[])? == 0 {
                    s.failure = Some("the last layer met a value that is not finite".to_owned());
                }
                Ok(())
            });
        }
        self.failure.take()
    }

    pub(crate) fn attempt(&mut self, work: impl FnOnce(&mut Self) -> Result<(), TchError>) {
        if self.failure.is_some() || self.graphs.as_ref().is_some_and(Graphs::skips) {
            return;
        }
        if let Err(e) = work(self) {
            self.failure = Some(reason(&e));
        }
    }

    /// Brings floats from the device; from a GPU by way of pinned memory, where the shim is there.
    pub(crate) fn land(&mut self, all: &Tensor, out: &mut [f32]) -> Result<(), TchError> {
        let (tch::Device::Cuda(device), Some(shim)) = (self.place.device, Shim::get()) else {
            return all.f_copy_data(out, out.len());
        };
        let len = out.len() as i64;
        if self.landing.as_ref().is_none_or(|there| there.numel() < out.len()) {
            self.landing = Some(pinned(&[len], Kind::Float, self.place.device)?);
        }
        let Some(landing) = &self.landing else { return all.f_copy_data(out, out.len()) };
        let landing = landing.f_narrow(0, 0, len)?;
        shim.copy(&landing, all).and_then(|()| shim.wait(device)).map_err(TchError::Kind)?;
        landing.f_copy_data(out, out.len())
    }

    /// As what is multiplied.
    pub(crate) fn computed(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_to_kind(self.place.compute)
    }

    /// `x / rms(x) * gain`, in f32.
    pub(crate) fn rms(&self, x: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor, TchError> {
        let x = x.f_to_kind(Kind::Float)?;
        if self.place.device.is_cuda() {
            let width = gain.size();
            return Ok(x.f_internal_fused_rms_norm(width, Some(gain), f64::from(eps))?.0);
        }
        let mean = x.f_square()?.f_mean_dim(-1, true, Kind::Float)?;
        x.f_mul(&mean.f_add_scalar(f64::from(eps))?.f_rsqrt()?)?.f_mul(gain)
    }

    /// Of the matrices `gate | up`.
    pub(crate) fn gate(
        &self,
        x: &Tensor,
        w: &Matrix,
        activation: Activation,
    ) -> Result<Tensor, TchError> {
        let both = w.product(x)?;
        let width = both.size()[1] / 2;
        let gate = activated(&both.f_narrow(1, 0, width)?, activation)?;
        gate.f_mul(&both.f_narrow(1, width, width)?)
    }

    pub(crate) fn rope(
        &self,
        config: &RopeConfig,
        positions: usize,
        factors: Option<&[f32]>,
    ) -> Result<Rope, TchError> {
        let (cos, sin) = millrace_engine::cpu::rope_tables(config, positions, factors);
        let pairs = i64::from(config.dim / 2);
        let to = |table: &[f32]| {
            Tensor::f_from_slice(table)?.f_view([-1, pairs.max(1)])?.f_to_device(self.place.device)
        };
        Ok(Rope { cos: to(&cos)?, sin: to(&sin)?, pairs, style: config.style })
    }

    /// Whether this is the look that counts. On a GPU each look waits for all that was asked of it, and
    /// what is not finite stays so to the end of the stage.
    pub(crate) fn looks(&mut self) -> bool {
        self.looked += 1;
        let every = !self.place.device.is_cuda() && !self.is_inside();
        every || self.looked > self.layers
    }

    /// Logits of some rows, in f32 on the device.
    pub(crate) fn head(
        &self,
        x: &Activations,
        rows: &Range<usize>,
        w: &Matrix,
    ) -> Result<Tensor, TchError> {
        let x = x.data.f_narrow(0, rows.start as i64, rows.len() as i64)?;
        w.product(&x)?.f_to_kind(Kind::Float)
    }
}

pub(crate) fn activated(x: &Tensor, activation: Activation) -> Result<Tensor, TchError> {
    match activation {
        Activation::Silu => x.f_silu(),
        Activation::GeluTanh => x.f_gelu("tanh"),
    }
}

#[cfg(test)]
mod tests {
    use millrace_shared::options::{Device, TorchDtype};

    use millrace_engine::model::Backend;
    use millrace_shared::model::Dtype;

    use super::*;

    #[test]
    fn a_failure_is_the_steps_and_not_the_nodes() {
        let place = Place::open(Device::Cpu, TorchDtype::F32).unwrap();
        let mut b = TorchBackend::new(place, 1);
        let mut x = b.tensor(1, 4, false).unwrap();
        b.begin_step();
        b.upload(&[1.0; 4], &mut x);
        // More than any machine has.
        b.attempt(|_| Tensor::f_zeros([1 << 48], (Kind::Float, tch::Device::Cpu)).map(drop));
        b.scale(&mut x, 2.0);
        assert_eq!(b.settle(&mut x, Dtype::F32), None);
        let failure = b.end_step().unwrap();
        assert!(
            failure.contains("out of memory") && failure.contains("--torch-dtype"),
            "{failure}"
        );
        assert!(!failure.contains('\n'), "{failure}");

        let mut out = [0.0; 4];
        b.begin_step();
        b.download(&x, &mut out);
        assert_eq!((b.end_step(), out), (None, [1.0; 4]), "what followed the failure did nothing");
    }
}
