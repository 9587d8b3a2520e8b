//! What a micro-batch costs, fitted while the pipeline runs.
//!
//! Per stage the time of a micro-batch is linear in what it holds: a fixed part (weights are read
//! whatever the rows), decode rows, prompt tokens, context positions that attention reads, rows
//! that need the head. The coefficients minimise the squared error over recent micro-batches, where
//! older ones count for less and ones far off the mark for less still (Huber), and none is negative
//! (cyclic coordinate descent over the decayed normal equations, begun at the last solution, so a
//! coefficient that nothing excites any more keeps its value).
//!
//! Not here: clocks, and what to do with a prediction. Invariant: predictions are finite, not
//! negative, and never fall when a load grows.

/// What a micro-batch asks of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Rows of one position that continue an answer.
    pub decode_rows: u32,
    /// Positions of prompts.
    pub prefill_tokens: u32,
    /// Positions of the cache that attention reads, summed over all positions of all rows.
    pub context: u64,
    /// Positions for which the last stage computes the head.
    pub head_rows: u32,
}

impl Load {
    /// Adds a decode row at `position`.
    #[must_use]
    pub fn with_decode(self, position: u32) -> Self {
        Self {
            decode_rows: self.decode_rows + 1,
            context: self.context + u64::from(position) + 1,
            head_rows: self.head_rows + 1,
            ..self
        }
    }

    /// Adds `count` positions of a prompt from `position`, `head` of which need the head.
    #[must_use]
    pub fn with_prompt(self, position: u32, count: u32, head: u32) -> Self {
        let (p, n) = (u64::from(position), u64::from(count));
        Self {
            prefill_tokens: self.prefill_tokens + count,
            context: self.context + n * p + n * (n + 1) / 2,
            head_rows: self.head_rows + head,
            ..self
        }
    }
}

/// Terms of the model: fixed, decode row, prompt token, context position, head row.
const TERMS: usize = 5;
/// Attention reads many positions for little; counted in these units the terms are of one size.
const CONTEXT_UNIT: f64 = 1024.0;
/// An observation counts for this much of the next one: a memory of about 200 micro-batches, which
/// is seconds, so that a machine that slows down is noticed and noise is not.
const DECAY: f64 = 0.995;
/// An observation whose error exceeds this many times the usual one counts for less.
const OUTLIER: f64 = 3.0;
/// Weight of the prior against one observation.
const RIDGE: f64 = 1e-4;
/// Rounds of coordinate descent per observation; the solution moves little from one to the next.
const SWEEPS: usize = 8;
/// Observations before predictions are used, where there is no prior.
const WARM: u64 = 8;
/// Tokens first, the fixed part last: what one kind of load cannot tell apart is put down to the
/// tokens, which errs on the side of short chunks.
const ORDER: [usize; TERMS] = [2, 1, 4, 3, 0];

/// Seconds per term.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageCost {
    /// Of any micro-batch.
    pub fixed: f64,
    /// Per decode row.
    pub decode_row: f64,
    /// Per prompt token.
    pub prefill_token: f64,
    /// Per context position read.
    pub context: f64,
    /// Per row that needs the head.
    pub head_row: f64,
}

impl StageCost {
    /// From what a node measured: seconds of one layer and of the head for micro-batches of so many
    /// `rows` (ascending), and what of the model the stage has. A line through the first and the
    /// last measurement; of attention it holds what a usual context costs, and the fit tells the rest.
    pub fn from_profile(
        rows: &[u32],
        layer: &[f64],
        head: &[f64],
        layers: u32,
        last: bool,
    ) -> Self {
        let line = |seconds: &[f64]| -> (f64, f64) {
            let (Some(&r0), Some(&r1)) = (rows.first(), rows.last()) else { return (0.0, 0.0) };
            let (Some(&t0), Some(&t1)) = (seconds.first(), seconds.last()) else {
                return (0.0, 0.0);
            };
            let slope = ((t1 - t0) / f64::from(r1.saturating_sub(r0).max(1))).max(0.0);
            ((t0 - slope * f64::from(r0)).max(0.0), slope)
        };
        let (fixed, row) = line(layer);
        let (head_fixed, head_row) = if last { line(head) } else { (0.0, 0.0) };
        let layers = f64::from(layers);
        Self {
            fixed: fixed * layers + head_fixed,
            decode_row: row * layers,
            prefill_token: row * layers,
            context: 0.0,
            head_row,
        }
    }

    /// Seconds of a micro-batch.
    pub fn predict(&self, load: &Load) -> f64 {
        self.fixed
            + self.decode_row * f64::from(load.decode_rows)
            + self.prefill_token * f64::from(load.prefill_tokens)
            + self.context * load.context as f64
            + self.head_row * f64::from(load.head_rows)
    }

    fn from_terms(c: &[f64; TERMS]) -> Self {
        Self {
            fixed: c[0],
            decode_row: c[1],
            prefill_token: c[2],
            context: c[3] / CONTEXT_UNIT,
            head_row: c[4],
        }
    }

    fn terms(&self) -> [f64; TERMS] {
        [
            self.fixed,
            self.decode_row,
            self.prefill_token,
            self.context * CONTEXT_UNIT,
            self.head_row,
        ]
        .map(|c| if c.is_finite() { c.max(0.0) } else { 0.0 })
    }
}

fn features(load: &Load) -> [f64; TERMS] {
    [
        1.0,
        f64::from(load.decode_rows),
        f64::from(load.prefill_tokens),
        load.context as f64 / CONTEXT_UNIT,
        f64::from(load.head_rows),
    ]
}

/// One stage.
#[derive(Clone, Debug)]
struct Fit {
    prior: [f64; TERMS],
    terms: [f64; TERMS],
    /// Decayed sum of weighted outer products of the features.
    gram: [[f64; TERMS]; TERMS],
    /// Decayed sum of weighted features times seconds.
    moment: [f64; TERMS],
    /// Usual size of an error, seconds.
    spread: f64,
    seen: u64,
}

impl Fit {
    fn new(prior: StageCost) -> Self {
        let prior = prior.terms();
        Self {
            prior,
            terms: prior,
            gram: [[0.0; TERMS]; TERMS],
            moment: [0.0; TERMS],
            spread: 0.0,
            seen: 0,
        }
    }

    fn observe(&mut self, load: &Load, seconds: f64) {
        let x = features(load);
        let predicted: f64 = x.iter().zip(&self.terms).map(|(x, c)| x * c).sum();
        let error = (seconds - predicted).abs();
        let trusted = self.seen >= WARM;
        let limit = OUTLIER * self.spread.max(predicted * 0.02);
        let weight = if trusted && error > limit { limit / error } else { 1.0 };
        // A change that lasts must get through: the usual error grows, though slowly.
        let counted = if trusted { error.min(2.0 * limit) } else { error };
        self.spread += (counted - self.spread) * if trusted { 0.05 } else { 0.5 };
        self.seen += 1;
        for i in 0..TERMS {
            for j in 0..TERMS {
                self.gram[i][j] = self.gram[i][j] * DECAY + weight * x[i] * x[j];
            }
            self.moment[i] = self.moment[i] * DECAY + weight * x[i] * seconds;
        }
        self.solve();
    }

    fn solve(&mut self) {
        for _ in 0..SWEEPS {
            for i in ORDER {
                let own = self.gram[i][i];
                if own <= f64::MIN_POSITIVE {
                    continue;
                }
                let others: f64 =
                    (0..TERMS).filter(|&j| j != i).map(|j| self.gram[i][j] * self.terms[j]).sum();
                let ridge = own * RIDGE;
                let best = (self.moment[i] - others + ridge * self.prior[i]) / (own + ridge);
                self.terms[i] = if best.is_finite() { best.max(0.0) } else { self.prior[i] };
            }
        }
    }
}

/// The stages of a pipeline.
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    fits: Vec<Fit>,
    costs: Vec<StageCost>,
    informed: bool,
}

impl CostModel {
    /// Begins with what the plan knows of each stage, in order; empty: with nothing.
    pub fn new(prior: &[StageCost]) -> Self {
        let fits: Vec<Fit> = prior.iter().copied().map(Fit::new).collect();
        let costs = fits.iter().map(|f| StageCost::from_terms(&f.terms)).collect();
        Self { fits, costs, informed: !prior.is_empty() }
    }

    /// Takes the measured seconds of each stage for a micro-batch. Where the number of stages is
    /// another than before, everything begins anew. What is not a time is left out.
    pub fn observe(&mut self, load: &Load, seconds: impl ExactSizeIterator<Item = f64>) {
        if seconds.len() != self.fits.len() {
            *self = Self::new(&vec![StageCost::default(); seconds.len()]);
            self.informed = false;
        }
        for ((fit, cost), seconds) in self.fits.iter_mut().zip(&mut self.costs).zip(seconds) {
            if seconds.is_finite() && seconds >= 0.0 {
                fit.observe(load, seconds);
                *cost = StageCost::from_terms(&fit.terms);
            }
        }
    }

    /// Whether predictions mean something.
    pub fn is_ready(&self) -> bool {
        self.informed || self.is_measured()
    }

    /// Whether they come from measurements, not from the plan alone.
    pub fn is_measured(&self) -> bool {
        self.fits.first().is_some_and(|f| f.seen >= WARM)
    }

    /// Seconds of the slowest stage.
    pub fn bottleneck(&self, load: &Load) -> f64 {
        self.costs.iter().map(|c| c.predict(load)).fold(0.0, f64::max)
    }

    /// Seconds of all stages together.
    pub fn sum(&self, load: &Load) -> f64 {
        self.costs.iter().map(|c| c.predict(load)).sum()
    }

    /// The coefficients of each stage, in order.
    pub fn stages(&self) -> &[StageCost] {
        &self.costs
    }

    /// The coefficients of the stage that is slowest with this load.
    pub fn slowest(&self, load: &Load) -> StageCost {
        let by_time = |a: &&StageCost, b: &&StageCost| a.predict(load).total_cmp(&b.predict(load));
        self.costs.iter().max_by(by_time).copied().unwrap_or_default()
    }

    /// The largest `count` in `1..=most` whose load, added by `with`, keeps every stage within
    /// `seconds`; 0 where not even one does. `with` must not fall as the count grows.
    pub fn largest(&self, most: u32, seconds: f64, with: impl Fn(u32) -> Load) -> u32 {
        let fits = |count: u32| self.bottleneck(&with(count)) <= seconds;
        if most == 0 || fits(most) {
            return most;
        }
        let (mut good, mut bad) = (0, most);
        while bad - good > 1 {
            let middle = good + (bad - good) / 2;
            if fits(middle) { good = middle } else { bad = middle }
        }
        good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A noise in -1..1 that repeats.
    fn noise(n: u64) -> f64 {
        let h = (n ^ 0x9e37_79b9).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((h >> 40) as f64 / f64::from(1u32 << 23)) - 1.0
    }

    fn loads() -> impl Iterator<Item = Load> {
        (0u64..).map(|n| {
            let rows = (n * 7 % 9) as u32;
            let mut load = Load::default();
            for r in 0..rows {
                load = load.with_decode(100 + (n as u32 * 31 + r * 57) % 1500);
            }
            if n % 3 != 0 {
                let count = 1 + (n * 13 % 64) as u32;
                load = load.with_prompt((n * 64 % 1024) as u32, count, u32::from(n % 5 == 0));
            }
            load
        })
    }

    const TRUE: StageCost = StageCost {
        fixed: 3e-3,
        decode_row: 4e-4,
        prefill_token: 6e-4,
        context: 2e-7,
        head_row: 2e-4,
    };

    #[test]
    fn finds_the_coefficients_in_noise_and_outliers() {
        let mut model = CostModel::default();
        for (n, load) in loads().take(1500).enumerate() {
            let mut seconds = TRUE.predict(&load) * (1.0 + 0.03 * noise(n as u64));
            if n % 50 == 7 {
                seconds *= 20.0; // A process that was swapped out.
            }
            model.observe(&load, [seconds].into_iter());
        }
        for load in loads().skip(2000).take(100) {
            let (found, right) = (model.bottleneck(&load), TRUE.predict(&load));
            assert!((found / right - 1.0).abs() < 0.12, "{load:?}: {found} of {right}");
        }
    }

    #[test]
    fn follows_a_machine_that_slows_down() {
        let mut model = CostModel::new(&[TRUE]);
        assert!(model.is_ready());
        for load in loads().take(600) {
            model.observe(&load, [2.0 * TRUE.predict(&load)].into_iter());
        }
        let load = Load::default().with_prompt(256, 48, 1);
        let ratio = model.bottleneck(&load) / TRUE.predict(&load);
        assert!((1.9..2.1).contains(&ratio), "{ratio}");
    }

    /// Weeks of decoding leave what is known of prompts as it was.
    #[test]
    fn what_is_not_exercised_is_kept() {
        let mut model = CostModel::default();
        for load in loads().take(500) {
            model.observe(&load, [TRUE.predict(&load)].into_iter());
        }
        for n in 0..20_000u32 {
            let load = (0..8).fold(Load::default(), |l, r| l.with_decode(500 + (n + r) % 64));
            model.observe(&load, [TRUE.predict(&load)].into_iter());
        }
        let load = Load::default().with_prompt(0, 64, 0);
        let ratio = model.bottleneck(&load) / TRUE.predict(&load);
        assert!((0.8..1.25).contains(&ratio), "{ratio}");
    }

    #[test]
    fn a_profile_is_where_it_begins() {
        let (layer, head) = ([2e-3, 2.3e-3, 3.5e-3, 8.3e-3], [4e-3, 4.3e-3, 5.5e-3, 10.3e-3]);
        let cost = StageCost::from_profile(&[1, 4, 16, 64], &layer, &head, 10, true);
        let load = (0..16).fold(Load::default(), |l, _| l.with_decode(0));
        assert!((cost.predict(&load) - (10.0 * 3.5e-3 + 5.5e-3)).abs() < 1e-9);
        let inner = StageCost::from_profile(&[1, 4, 16, 64], &layer, &head, 10, false);
        assert!((inner.predict(&load) - 35e-3).abs() < 1e-9);
        let nothing = StageCost::from_profile(&[], &[], &[], 3, true);
        assert_eq!(nothing, StageCost::default());
    }

    #[test]
    fn nonsense_is_left_out_and_chunks_are_found() {
        let mut model = CostModel::new(&[TRUE, StageCost { fixed: f64::NAN, ..TRUE }]);
        let load = Load::default().with_decode(3);
        model.observe(&load, [f64::NAN, -1.0].into_iter());
        assert!(model.bottleneck(&load).is_finite());
        let with = |n| Load::default().with_prompt(0, n, 0);
        let most = model.largest(64, 3e-3 + 20.5 * 6e-4, with);
        assert_eq!(most, 20);
        assert_eq!(model.largest(64, 0.0, with), 0);
        assert_eq!(model.largest(64, 1.0, with), 64);
    }
}
