//! "Where is my request?": what the batcher knows of requests, and what the stages report, in words.
//!
//! Nobody announces which stage a micro-batch is at. But stages compute micro-batches in order, and
//! count them with every heartbeat: the first stage that has done fewer than the one before it has
//! one waiting.

use millrace_shared::error::Status;
use millrace_shared::wire::admin::{AdminReply, RequestQuery, RequestReport};
use millrace_shared::wire::rpc::StageStatus;

use crate::actors::batcher::{Cancel, Flight, Look, Seen};
use crate::actors::cluster::GetStatus;
use crate::service::{Caller, unknown_request};
use crate::serving::{Serving, crossed};

/// A micro-batch is younger than what stages have said of themselves: two heartbeats.
const FRESH: f64 = 0.5;

/// Answers an administrator.
///
/// # Errors
/// If there is no such request.
pub(crate) async fn answer(serving: &Serving, query: RequestQuery) -> Result<AdminReply, Status> {
    let (id, stuck) = match query {
        RequestQuery::List { stuck } => (None, stuck),
        RequestQuery::Show { id } | RequestQuery::Cancel { id } => (Some(id), false),
    };
    let seen = serving.batcher.send(Look { id }).await.map_err(crossed)?;
    if let Some(id) = id.filter(|_| seen.is_empty()) {
        return Err(unknown_request(id));
    }
    let stages = serving.cluster.send(GetStatus).await.unwrap_or_default().stages;
    let mut reports: Vec<RequestReport> =
        seen.into_iter().map(|seen| place(seen, &stages)).filter(|r| r.stuck || !stuck).collect();
    if let RequestQuery::Cancel { id } = query {
        let caller = Caller { admin: true, ..Caller::default() };
        serving.batcher.send(Cancel { request_id: id, caller }).await.map_err(crossed)??;
        reports.iter_mut().for_each(|r| r.state = format!("cancelled; it was {}", r.state));
    }
    Ok(AdminReply::Requests(reports))
}

/// Names the stage of what is in flight.
fn place(seen: Seen, stages: &[StageStatus]) -> RequestReport {
    let mut report = seen.report;
    let Some(flight) = seen.flight else { return report };
    let seconds = flight.seconds;
    let number = flight.micro_batch;
    let at = stage_of(&flight, stages).and_then(|at| Some((at, stages.get(at)?)));
    report.state = match at {
        Some((at, stage)) => {
            let node = &stage.node_name;
            format!(
                "{}; micro-batch {number} at stage {at} on {node} for {seconds:.1} s",
                report.state
            )
        }
        None => format!("{}; micro-batch {number} in flight for {seconds:.1} s", report.state),
    };
    report.node = at.map(|(_, stage)| stage.node_name.clone());
    report
}

/// The stage where a micro-batch is.
fn stage_of(flight: &Flight, stages: &[StageStatus]) -> Option<usize> {
    if stages.is_empty() {
        return None;
    }
    if flight.seconds > FRESH {
        let behind = stages.windows(2).position(|pair| pair[1].steps < pair[0].steps);
        return Some(behind.map_or(0, |before| before + 1));
    }
    // By what stages usually take.
    let mut until = 0.0;
    let passed = flight.usual.iter().take_while(|seconds| {
        until += **seconds;
        until < flight.seconds
    });
    Some(passed.count().min(stages.len() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(steps: u64) -> StageStatus {
        StageStatus {
            node_id: millrace_shared::id::NodeId(uuid::Uuid::from_u128(7)),
            node_name: format!("gpu-{steps}"),
            first_layer: 0,
            end_layer: 1,
            embed: false,
            head: false,
            weight_bytes: 0,
            busy_seconds: 0.0,
            wall_seconds: 0.0,
            process_seconds: 0.0,
            steps,
            threads: 1,
            rows_left_out: 0,
            credits: 1,
            round_trip: None,
        }
    }

    #[test]
    fn the_stage_that_lags_has_it() {
        let flight = |seconds| Flight { micro_batch: 9, seconds, usual: vec![0.1, 0.2, 0.1] };
        let stages = [stage(812), stage(812), stage(811)];
        assert_eq!(stage_of(&flight(4.1), &stages), Some(2));
        assert_eq!(stage_of(&flight(4.1), &[stage(5), stage(4), stage(4)]), Some(1));
        assert_eq!(
            stage_of(&flight(4.1), &[stage(5), stage(5)]),
            Some(0),
            "the first never did it"
        );
        assert_eq!(stage_of(&flight(0.05), &stages), Some(0));
        assert_eq!(stage_of(&flight(0.25), &stages), Some(1));
        assert_eq!(stage_of(&flight(0.45), &stages), Some(2), "no further than the last");
        assert_eq!(stage_of(&flight(1.0), &[]), None);
    }
}
