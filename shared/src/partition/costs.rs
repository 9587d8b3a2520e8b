//! What plans are made from: times and memory of nodes, bytes of a model, links.
//!
//! All figures are measured or estimated elsewhere; here they are only numbers. Times depend on the
//! rows of a micro-batch, so that they are curves.

use super::LayerRange;

/// Seconds by the rows of a micro-batch: measured points, straight lines between them and beyond
/// the last.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve(Vec<(f64, f64)>);

impl Curve {
    /// From points `(rows, seconds)`; what is not a finite time at finite rows is left out.
    pub fn new(points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let sound = |&(rows, s): &(f64, f64)| rows.is_finite() && s.is_finite() && s >= 0.0;
        let mut points: Vec<_> = points.into_iter().filter(sound).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|b, a| a.0 == b.0);
        Self(points)
    }

    /// The same for any number of rows.
    pub fn flat(seconds: f64) -> Self {
        Self::new([(1.0, seconds)])
    }

    /// The same where each row stands for `factor` rows.
    #[must_use]
    pub fn with_rows(&self, factor: f64) -> Self {
        Self::new(self.0.iter().map(|&(rows, seconds)| (rows / factor, seconds)))
    }

    /// Seconds for this many rows; 0 of an empty curve.
    pub fn at(&self, rows: f64) -> f64 {
        let points = &self.0;
        match points.len() {
            0 => 0.0,
            1 => points[0].1,
            n => {
                // Before the first point as at it: a step never costs nothing.
                let rows = rows.max(points[0].0);
                let right = points.partition_point(|p| p.0 < rows).clamp(1, n - 1);
                let ((x0, y0), (x1, y1)) = (points[right - 1], points[right]);
                // Never falling: a measurement's noise would make larger batches free.
                y0 + (y1 - y0).max(0.0) * (rows - x0) / (x1 - x0)
            }
        }
    }

    /// Seconds for each of some rows.
    pub fn is_known(&self) -> bool {
        !self.0.is_empty()
    }
}

/// What a model needs.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCosts {
    /// Bytes of weights of each layer as they lie in memory.
    pub layer_bytes: Vec<u64>,
    /// Time of each layer, relative to the layer that nodes measured; as many.
    pub layer_share: Vec<f64>,
    /// Bytes of the embedding, on the first stage.
    pub embed_bytes: u64,
    /// Bytes of final norm and head, on the last stage (of a tied head: the matrix again).
    pub head_bytes: u64,
    /// Whether the head is the embedding matrix: one stage alone holds it once.
    pub tied_head: bool,
    /// Bytes of the whole KV cache in one layer.
    pub kv_bytes_per_layer: u64,
    /// Bytes that every stage takes whatever its layers.
    pub stage_bytes: u64,
    /// Bytes of one row between two stages.
    pub row_bytes: u64,
}

impl ModelCosts {
    /// Layers.
    pub fn layers(&self) -> usize {
        self.layer_bytes.len()
    }

    /// Bytes that a stage takes.
    pub fn stage_memory(&self, layers: std::ops::Range<usize>, first: bool, last: bool) -> u64 {
        let weights =
            self.layer_bytes[layers.clone()].iter().fold(0u64, |a, &b| a.saturating_add(b));
        let kv = self.kv_bytes_per_layer.saturating_mul(layers.len() as u64);
        weights.saturating_add(kv).saturating_add(self.end_memory(first, last))
    }

    /// Of that, what does not depend on the layers.
    pub(super) fn end_memory(&self, first: bool, last: bool) -> u64 {
        let embed = if first { self.embed_bytes } else { 0 };
        let head = if last { self.head_bytes } else { 0 };
        let shared = if first && last && self.tied_head { self.embed_bytes } else { 0 };
        self.stage_bytes.saturating_add(embed).saturating_add(head).saturating_sub(shared)
    }
}

/// What a node offers.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeCosts {
    /// For messages.
    pub name: String,
    /// Time of the model's usual layer.
    pub layer: Curve,
    /// Time of final norm and head.
    pub head: Curve,
    /// Time of the embedding.
    pub embed: Curve,
    /// Bytes it may use for weights, KV cache and scratch.
    pub memory_bytes: u64,
    /// Layers that it must have, these exactly; `None` for whatever is best.
    pub pin: Option<LayerRange>,
}

/// A way between two places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// There and back, of a small packet.
    pub rtt_seconds: f64,
    /// Bandwidth; infinite where it does not matter.
    pub bytes_per_second: f64,
}

impl Link {
    /// A link that costs nothing.
    pub const FREE: Self = Self { rtt_seconds: 0.0, bytes_per_second: f64::INFINITY };

    /// Until all of a message has arrived.
    pub fn seconds(&self, bytes: f64) -> f64 {
        self.rtt_seconds / 2.0 + bytes / self.bytes_per_second
    }
}

/// Links between all nodes, and between each node and the coordinator; directed.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    nodes: usize,
    /// `[from][to]`; the coordinator comes last. `None`: forbidden.
    links: Vec<Option<Link>>,
    /// What the coordinator needs to build a micro-batch and to take its result.
    pub scheduling_seconds: f64,
}

impl Network {
    /// The same link between all.
    pub fn uniform(nodes: usize, link: Link) -> Self {
        let places = nodes + 1;
        Self { nodes, links: vec![Some(link); places * places], scheduling_seconds: 0.0 }
    }

    /// How many nodes it links.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// The place of the coordinator, beside those of the nodes `0..nodes`.
    pub fn coordinator(&self) -> usize {
        self.nodes
    }

    /// The link from one place to another; `None` where it is forbidden.
    pub fn get(&self, from: usize, to: usize) -> Option<Link> {
        self.links[from * (self.nodes + 1) + to]
    }

    /// Sets the link from one place to another.
    pub fn set(&mut self, from: usize, to: usize, link: Option<Link>) {
        self.links[from * (self.nodes + 1) + to] = link;
    }

    /// The links among some of the nodes, in their new order (a node may appear twice: a twin has
    /// its links), and those to the coordinator.
    pub fn select(&self, nodes: &[usize]) -> Self {
        let places: Vec<usize> = nodes.iter().copied().chain([self.nodes]).collect();
        let links = places.iter().flat_map(|&a| places.iter().map(move |&b| (a, b)));
        Self {
            nodes: nodes.len(),
            links: links.map(|(a, b)| self.get(a, b)).collect(),
            scheduling_seconds: self.scheduling_seconds,
        }
    }
}

/// A model, nodes and links at one size of micro-batches: what is to be cut.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// The model.
    pub model: &'a ModelCosts,
    /// The nodes.
    pub nodes: &'a [NodeCosts],
    /// Their links; as many nodes.
    pub network: &'a Network,
    /// Rows of a micro-batch.
    pub rows: f64,
}

impl Problem<'_> {
    /// Seconds of a stage.
    pub fn stage_seconds(
        &self,
        node: usize,
        layers: std::ops::Range<usize>,
        first: bool,
        last: bool,
    ) -> f64 {
        let costs = &self.nodes[node];
        let share: f64 = self.model.layer_share[layers].iter().sum();
        let embed = if first { costs.embed.at(self.rows) } else { 0.0 };
        let head = if last { costs.head.at(self.rows) } else { 0.0 };
        share * costs.layer.at(self.rows) + embed + head
    }

    /// Seconds from one place to another; infinite where that is forbidden. To and from the
    /// coordinator only ids travel.
    pub fn hop_seconds(&self, from: usize, to: usize) -> f64 {
        let home = self.network.coordinator();
        let bytes =
            if from == home || to == home { 0.0 } else { self.rows * self.model.row_bytes as f64 };
        let scheduling = if from == home { self.network.scheduling_seconds } else { 0.0 };
        self.network.get(from, to).map_or(f64::INFINITY, |l| l.seconds(bytes) + scheduling)
    }

    /// Seconds for which a micro-batch occupies a link between nodes.
    pub fn transfer_seconds(&self, from: usize, to: usize) -> f64 {
        let bytes = self.rows * self.model.row_bytes as f64;
        self.network.get(from, to).map_or(f64::INFINITY, |l| bytes / l.bytes_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_straight_between_points() {
        let curve = Curve::new([(4.0, 2.0), (1.0, 1.0), (16.0, 8.0), (f64::NAN, 1.0)]);
        assert_eq!(curve.at(1.0), 1.0);
        assert_eq!(curve.at(0.5), 1.0);
        assert_eq!(curve.at(2.5), 1.5);
        assert_eq!(curve.at(10.0), 5.0);
        assert_eq!(curve.at(28.0), 14.0);
        assert_eq!(curve.with_rows(4.0).at(2.5), curve.at(10.0));
        assert_eq!(Curve::flat(3.0).at(99.0), 3.0);
        assert_eq!(Curve::new([]).at(5.0), 0.0);
        let noisy = Curve::new([(1.0, 2.0), (4.0, 1.0)]);
        assert_eq!(noisy.at(64.0), 2.0);
    }

    #[test]
    fn a_tied_head_is_counted_once_on_one_stage() {
        let model = ModelCosts {
            layer_bytes: vec![10, 20],
            layer_share: vec![1.0; 2],
            embed_bytes: 5,
            head_bytes: 6,
            tied_head: true,
            kv_bytes_per_layer: 1,
            stage_bytes: 100,
            row_bytes: 4,
        };
        assert_eq!(model.stage_memory(0..2, true, true), 100 + 32 + 6);
        assert_eq!(model.stage_memory(0..1, true, false), 100 + 11 + 5);
        assert_eq!(model.stage_memory(1..2, false, true), 100 + 21 + 6);
    }

    #[test]
    fn twins_have_the_same_links() {
        let mut network = Network::uniform(2, Link::FREE);
        network.set(0, 1, None);
        let three = network.select(&[1, 0, 0]);
        assert_eq!((three.get(1, 0), three.get(2, 0)), (None, None));
        assert_eq!(three.get(0, 1), Some(Link::FREE));
        assert_eq!(three.coordinator(), 3);
    }
}
