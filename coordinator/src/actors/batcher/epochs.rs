//! From one epoch to the next: the fence, the switch, and what waits while nothing is up.
//!
//! One path for every change. A new epoch gets every sequence by
//! [`Scheduler::handle_epoch`], which computes it anew from its tokens; the last stage hears of it
//! again by `SequenceOpen`. Where the old epoch still works, its micro-batches come back first (the
//! fence), so that no token is computed twice; where it was lost, they are void.

use std::time::Duration;

use actix::prelude::*;
use millrace_shared::error::Status;
use millrace_shared::id::{Epoch, PipelineId, RequestId};
use millrace_shared::membership::{Balance, LinkTimes, Oldest, Paces};
use millrace_shared::scheduler::cost::StageCost;
use millrace_shared::scheduler::{Scheduler, SchedulerConfig};
use millrace_shared::wire::data::{ResultMeta, RowOutcome, RowResult, StageTime};
use millrace_shared::wire::frame::Frame;
use tokio::sync::mpsc;

use super::{Active, Batcher, RETRY_PIPELINE_MS};
use crate::actors::cluster::{Cluster, EdgeFailed, Paced, Stalled, Switched, Uneven};

/// A pipeline is ready; where another epoch serves, it goes on from there.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct PipelineUp {
    /// Which.
    pub pipeline: PipelineId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Limits.
    pub config: SchedulerConfig,
    /// Tokens that the model knows.
    pub vocabulary: u32,
    /// Numbers in a hidden state.
    pub hidden: u32,
    /// What each stage costs, before anything is measured.
    pub costs: Vec<StageCost>,
    /// Names of the stages' nodes, in order.
    pub nodes: Vec<String>,
    /// Silence that is a stall at the least.
    pub lease: Duration,
    /// What the links between stages take.
    pub links: LinkTimes,
    /// To the first stage.
    pub steps: mpsc::Sender<Frame>,
    /// To the last stage.
    pub opens: mpsc::Sender<Frame>,
    /// Whom to tell how it goes.
    pub cluster: Addr<Cluster>,
}

impl Handler<PipelineUp> for Batcher {
    type Result = ();

    fn handle(&mut self, m: PipelineUp, _: &mut Context<Self>) {
        self.next = Some(m);
        self.pump();
    }
}

/// The pipeline is lost, or not formed yet.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct PipelineDown {
    /// Why, and what it waits for.
    pub detail: String,
    /// Nothing will come up again.
    pub forever: bool,
}

impl Handler<PipelineDown> for Batcher {
    type Result = ();

    fn handle(&mut self, m: PipelineDown, _: &mut Context<Self>) {
        self.detail = m.detail;
        self.next = None;
        if self.active.is_some() {
            self.note_epoch_end();
        }
        if self.active.take().is_some() && !m.forever {
            self.suspended = Some(self.now());
        }
        if m.forever && self.survives() {
            self.leave_to_the_next_life();
        } else if m.forever {
            self.give_up();
        }
    }
}

impl Batcher {
    /// What is said to requests while nothing is up.
    pub(super) fn unavailable(&self) -> Status {
        Status::unavailable(format!("no pipeline is ready: {}", self.detail), RETRY_PIPELINE_MS)
    }

    /// Begins the next epoch as soon as the present one has nothing in flight.
    pub(super) fn begin_next(&mut self, now: Duration) {
        let busy = |s: &Scheduler| s.stats().in_flight > 0;
        let fenced = self.active.as_ref().is_some_and(|a| !a.broken)
            && self.scheduler.as_ref().is_some_and(busy);
        let Some(next) = self.next.take_if(|_| !fenced) else { return };
        let (mut scheduler, mut refused) = match self.scheduler.take() {
            Some(mut scheduler) => {
                let refused = scheduler.handle_epoch(next.config);
                (scheduler, refused)
            }
            None => (Scheduler::new(next.config), Vec::new()),
        };
        refused.extend(self.resume(&mut scheduler));
        self.doubts.begin_epoch(&mut scheduler);
        scheduler.set_prior(&next.costs);
        self.scheduler = Some(scheduler);
        self.cluster = Some(next.cluster.clone());
        if let Some(since) = self.suspended.take() {
            let waited = now.saturating_sub(since).as_secs_f64();
            let requests = self.requests.len();
            tracing::info!(requests, "requests go on after {waited:.2} s without a pipeline");
        }
        for (sequence, why) in refused {
            let Some(request) = self.forget(sequence) else { continue };
            self.fail(request, Status::exhausted(why.to_string(), RETRY_PIPELINE_MS));
        }
        let _ = next.cluster.try_send(Switched { epoch: next.epoch });
        self.masks.on_epoch();
        self.let_early_in();
        self.active = Some(Active {
            pipeline: next.pipeline,
            epoch: next.epoch,
            lease: next.lease,
            vocabulary: next.vocabulary,
            hidden: next.hidden,
            last_stage: next.costs.len().saturating_sub(1) as u16,
            nodes: next.nodes,
            links: next.links,
            steps: next.steps,
            opens: next.opens,
            cluster: next.cluster,
            balance: Balance::default(),
            paces: Paces::default(),
            broken: false,
            first: None,
        });
    }

    /// Notes what a micro-batch took in each stage.
    pub(super) fn watch(&mut self, results: &ResultMeta, now: Duration) {
        let Some(active) = &mut self.active else { return };
        let (epoch, rows) = (active.epoch, results.rows.len() as u32);
        let steps: Vec<Duration> = results.times.iter().map(StageTime::step).collect();
        if let Some(seconds) = active.balance.handle_times(&steps, now) {
            let _ = active.cluster.try_send(Uneven { epoch, seconds });
        }
        let answer =
            |row: &RowResult| row.count == 1 && matches!(row.outcome, RowOutcome::Token { .. });
        if rows > 0
            && !steps.is_empty()
            && results.rows.iter().all(answer)
            && let Some(pace) = active.paces.handle_times(rows, &steps, now)
        {
            let _ = active.cluster.try_send(Paced { epoch, pace });
        }
    }

    pub(super) fn break_off(&mut self) {
        let Some(active) = self.active.as_mut() else { return };
        active.broken = true;
        let message = "an edge of the coordinator is lost".to_owned();
        let _ = active.cluster.try_send(EdgeFailed { epoch: active.epoch, message });
    }

    /// Every wait has a deadline: also the one for a stage that neither answers nor dies.
    pub(super) fn check_stall(&mut self, now: Duration) {
        let (Some(active), Some(scheduler)) = (&self.active, &self.scheduler) else { return };
        let oldest = scheduler.oldest_in_flight().map(|(id, issued)| Oldest {
            issued,
            predicted: scheduler.predicted_seconds(id).iter().sum(),
            positions: scheduler.positions(id),
        });
        if self.stalls.is_stalled(oldest, &active.links, active.lease, now) {
            let (id, issued) = scheduler.oldest_in_flight().unwrap_or_default();
            let nth = id.0.saturating_sub(active.first.unwrap_or(id.0)) + 1;
            let (epoch, micro_batch) = (active.epoch, id.0);
            let waited = now.saturating_sub(issued);
            let _ = active.cluster.try_send(Stalled { epoch, nth, micro_batch, waited });
            self.note_death();
        }
    }

    /// Requests do not wait for ever.
    pub(super) fn check_suspended(&mut self, now: Duration) {
        if self.suspended.is_some_and(|since| now.saturating_sub(since) >= self.recovery) {
            self.give_up();
        }
    }

    /// Ends every request; until a pipeline is up, new ones are refused.
    fn give_up(&mut self) {
        self.suspended = None;
        self.resumed.clear();
        self.refuse_early();
        let all: Vec<RequestId> = self.requests.iter().map(|r| r.id).collect();
        for id in all {
            let Some(request) = self.end(id) else { continue };
            let status = Status::unavailable(
                format!("the pipeline was lost while the request ran: {}", self.detail),
                RETRY_PIPELINE_MS,
            );
            self.fail(request, status);
        }
    }
}
