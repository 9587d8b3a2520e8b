//! "Where is my request?": what the batcher knows of requests, and what the stages report, in words.
//!
//! Nobody announces where a micro-batch is. But stages take and compute micro-batches in order, and
//! count them with every heartbeat: it is at the first stage that has not computed so many, or on the
//! link to it where that has not received so many. While the pipeline forms again, what it recovers
//! from is the answer.

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::admin::{AdminReply, RequestQuery, RequestReport};

use crate::actors::batcher::{Cancel, Flight, Look, Seen};
use crate::actors::cluster::{GetPlaces, Places, Spot, whereabouts};
use crate::service::Caller;
use crate::serving::{Serving, crossed};

/// A micro-batch is younger than what stages have said of themselves: two heartbeats.
const FRESH: f64 = 0.5;

/// Answers an administrator.
///
/// # Errors
/// If there is no such request.
pub(crate) async fn answer(serving: &Serving, query: RequestQuery) -> Result<AdminReply, Status> {
    let (name, stuck) = match &query {
        RequestQuery::List { stuck } => (None, *stuck),
        RequestQuery::Show { id } | RequestQuery::Cancel { id } => (Some(id.as_str()), false),
    };
    let named = name.map(|name| serving.metrics.names().find(name)).unwrap_or_default();
    let seen = match (name, named.request) {
        (Some(_), None) => Vec::new(),
        (_, id) => serving.batcher.send(Look { id }).await.map_err(crossed)?,
    };
    if let Some(name) = name.filter(|_| seen.is_empty()) {
        let why = named.refused.ok_or_else(|| unknown(name))?;
        return Ok(AdminReply::Requests(vec![refused(name, &why)]));
    }
    let places = serving.cluster.send(GetPlaces).await.unwrap_or_default();
    let mut reports: Vec<RequestReport> =
        seen.into_iter().map(|seen| place(seen, &places)).filter(|r| r.stuck || !stuck).collect();
    if let (RequestQuery::Cancel { .. }, Some(request_id)) = (&query, named.request) {
        let caller = Caller { admin: true, ..Caller::default() };
        serving.batcher.send(Cancel { request_id, caller }).await.map_err(crossed)??;
        reports.iter_mut().for_each(|r| r.state = format!("cancelled; it was {}", r.state));
    }
    Ok(AdminReply::Requests(reports))
}

fn unknown(name: &str) -> Status {
    let message = format!(
        "no request is called '{name}' here: it was never submitted, was not kept, or ended too long \
         ago (--journal and --retain of the coordinator say what is kept)"
    );
    Status::new(ErrorCode::NotFound, message)
}

/// One that never got to the pipeline.
fn refused(name: &str, why: &str) -> RequestReport {
    RequestReport {
        id: name.to_owned(),
        state: format!("turned away: {why}"),
        ..RequestReport::default()
    }
}

/// Names what a request waits for.
fn place(seen: Seen, places: &Places) -> RequestReport {
    let mut report = seen.report;
    if seen.suspended {
        if let Some((node, what)) = &places.trouble {
            // The pipeline's own words for it are longer, and know no names.
            let state = report.state.split(';').next().unwrap_or_default();
            report.state = format!("{state}; {what}");
            report.node.clone_from(node);
        }
        return report;
    }
    if seen.starved {
        report.node.clone_from(&places.fullest);
        if let Some(node) = &places.fullest {
            report.state = format!("{}; {node} has the least room for the cache", report.state);
        }
    }
    let Some(flight) = seen.flight else { return report };
    let (seconds, number) = (flight.seconds, flight.micro_batch);
    let spot = spot_of(&flight, places);
    let at = match spot {
        Some(Spot::Stage(_)) => format!("at {} ", spot_words(spot, places)),
        Some(Spot::LinkTo(_)) => format!("on {} ", spot_words(spot, places)),
        None => "in flight ".to_owned(),
    };
    report.state = format!("{}; micro-batch {number} {at}for {seconds:.1} s", report.state);
    if let Some(Spot::Stage(at)) = spot
        && places.stages.get(at).is_some_and(|s| s.silent)
    {
        report.state.push_str(", which says nothing any more");
    }
    report.node = report.node.or_else(|| spot.and_then(|spot| spot.node(&places.stages)));
    report
}

fn spot_words(spot: Option<Spot>, places: &Places) -> String {
    spot.map(|spot| spot.words(&places.stages)).unwrap_or_default()
}

/// Where a micro-batch is.
fn spot_of(flight: &Flight, places: &Places) -> Option<Spot> {
    if flight.seconds > FRESH {
        return whereabouts(&places.stages, flight.nth);
    }
    // By what stages usually take.
    let mut until = 0.0;
    let passed = flight.usual.iter().take_while(|seconds| {
        until += **seconds;
        until < flight.seconds
    });
    let last = places.stages.len().checked_sub(1)?;
    Some(Spot::Stage(passed.count().min(last)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::cluster::StagePlace;

    fn stage(node: &str, received: u64, steps: u64) -> StagePlace {
        StagePlace { node: node.to_owned(), received, steps, silent: false }
    }

    fn places() -> Places {
        let stages = vec![stage("a", 9, 9), stage("b", 8, 8), stage("c", 8, 8)];
        Places { stages, trouble: None, fullest: Some("b".to_owned()) }
    }

    fn seen(flight: Option<Flight>) -> Seen {
        let state = "computing token 8".to_owned();
        let report = RequestReport { state, ..refused("r", "") };
        Seen { report, flight, suspended: false, starved: false }
    }

    fn flight(seconds: f64) -> Option<Flight> {
        Some(Flight { micro_batch: 812, nth: 9, seconds, usual: vec![0.1, 0.2, 0.1] })
    }

    #[test]
    fn what_does_not_come_back_is_named() {
        let shown = |seen, places: &Places| {
            let report = place(seen, places);
            (report.state, report.node.unwrap_or_default())
        };
        let words =
            |text: &str, node: &str| (format!("computing token 8; {text}"), node.to_owned());
        let mut at = places();
        let link = words("micro-batch 812 on the link from a to b for 4.1 s", "b");
        assert_eq!(shown(seen(flight(4.1)), &at), link);
        at.stages[1].received = 9;
        let stage = words("micro-batch 812 at stage 1 on b for 4.1 s", "b");
        assert_eq!(shown(seen(flight(4.1)), &at), stage);
        at.stages[1].silent = true;
        assert!(shown(seen(flight(4.1)), &at).0.ends_with("which says nothing any more"));
        let usual = words("micro-batch 812 at stage 1 on b for 0.2 s", "b");
        assert_eq!(shown(seen(flight(0.2)), &places()), usual, "by what stages usually take");
        let last = words("micro-batch 812 at stage 2 on c for 0.5 s", "c");
        assert_eq!(shown(seen(flight(0.45)), &places()), last, "no further than the last");
        let starved = Seen { starved: true, ..seen(None) };
        assert_eq!(shown(starved, &places()).1, "b");
    }

    #[test]
    fn what_is_recovered_from_is_named() {
        let mut at = places();
        let what = "node b was lost (no heartbeat) 0.4 s ago".to_owned();
        at.trouble = Some((Some("b".to_owned()), what));
        let report = place(Seen { suspended: true, ..seen(flight(4.0)) }, &at);
        assert_eq!(report.state, "computing token 8; node b was lost (no heartbeat) 0.4 s ago");
        assert_eq!(report.node.as_deref(), Some("b"));
    }
}
