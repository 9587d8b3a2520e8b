//! Every observation appears under its name.

use super::*;
use millrace_shared::id::NodeId;
use millrace_shared::wire::rpc::StageStatus;
use uuid::Uuid;

fn stage(name: &str, busy_seconds: f64) -> StageStatus {
    StageStatus {
        node_id: NodeId(Uuid::nil()),
        node_name: name.into(),
        first_layer: 0,
        end_layer: 1,
        embed: true,
        head: true,
        weight_bytes: 0,
        busy_seconds,
        wall_seconds: 9.0,
        process_seconds: 0.0,
        steps: 1,
        threads: 1,
        rows_left_out: 3,
        credits: 4,
        round_trip: Some(0.5),
    }
}

fn line(text: &str, start: &str) -> String {
    let found = text.lines().find(|l| l.starts_with(start));
    found.unwrap_or_else(|| panic!("no line '{start}' in\n{text}")).to_owned()
}

#[test]
fn observations_appear_under_their_names() {
    let m = Metrics::new("tiny");
    m.on_submit();
    m.on_prompt_tokens(7);
    m.on_first_token(Duration::from_millis(2), Duration::from_millis(30));
    m.on_token(Duration::from_millis(4));
    m.on_finished(FinishReason::Length, Duration::from_millis(34));
    m.on_failed(ErrorCode::Unavailable);
    m.on_refused(ErrorCode::NotFound);
    let text = m.render();
    assert!(line(&text, "millrace_prompt_tokens_total{").contains("model_name=\"tiny\""));
    assert!(line(&text, "millrace_prompt_tokens_total{").ends_with("} 7"));
    assert!(line(&text, "millrace_generation_tokens_total{").ends_with(" 2"));
    assert!(line(&text, "millrace_time_to_first_token_seconds_count{").ends_with(" 1"));
    assert!(line(&text, "millrace_inter_token_latency_seconds_count{").ends_with(" 1"));
    assert!(line(&text, "millrace_request_queue_time_seconds_count{").ends_with(" 1"));
    assert!(line(&text, "millrace_e2e_request_latency_seconds_sum{").contains("0.034"));
    assert!(line(&text, "millrace_requests_total{").ends_with(" 2"), "refused ones count too");
    let success = line(&text, "millrace_request_success_total{");
    assert!(success.contains("finished_reason=\"length\""), "{success}");
    for code in ["UNAVAILABLE", "NOT_FOUND"] {
        let label = format!("code=\"{code}\"");
        let failures = text.lines().filter(|l| l.starts_with("millrace_request_failure_total{"));
        assert!(failures.clone().any(|l| l.contains(&label) && l.ends_with(" 1")), "{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn micro_batches_are_seen_beside_their_prediction() {
    let m = Metrics::new("tiny");
    let ms = Duration::from_millis;
    let times = [StageTime::new(ms(1), ms(10)), StageTime::new(ms(2), ms(20))];
    let stats = SchedulerStats {
        in_flight: 2,
        window: 3,
        round_trip: ms(40),
        link: ms(7),
        ..SchedulerStats::default()
    };
    m.on_micro_batch(&times, &[], &stats);
    m.on_micro_batch(&times, &[0.25, 0.5], &stats);
    m.on_shed(Shed::Deadline);
    let text = m.render();
    let stage = |name: &str, stage: u32| {
        let label = format!("stage=\"{stage}\"");
        let lines = text.lines().filter(|l| l.starts_with(&format!("{name}_total{{")));
        let found = lines.clone().find(|l| l.contains(&label));
        found.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or(f64::NAN)
    };
    assert!((stage("millrace_stage_step_seconds", 1) - 0.04).abs() < 1e-9, "{text}");
    assert!((stage("millrace_stage_wait_seconds", 0) - 0.002).abs() < 1e-9, "{text}");
    assert!((stage("millrace_stage_step_predicted_seconds", 0) - 0.25).abs() < 1e-9, "{text}");
    assert!(line(&text, "millrace_micro_batches_in_flight{").ends_with(" 2"));
    assert!(line(&text, "millrace_micro_batches_window{").ends_with(" 3"));
    assert!(line(&text, "millrace_links_seconds{").ends_with(" 0.007"));
    assert!(line(&text, "millrace_micro_batch_round_trip_seconds_count{").ends_with(" 2"));
    assert!(line(&text, "millrace_requests_shed_total{").contains("reason=\"deadline\""));
}

#[test]
fn cluster_state_replaces_gauges_and_raises_counters() {
    let m = Metrics::new("tiny");
    m.on_prompt_tokens(10);
    let mut status = ClusterStatus {
        epoch: 4,
        nodes: 2,
        kv_blocks: 8,
        kv_blocks_used: 2,
        prompt_tokens: 6,
        preemptions: 5,
        prefix_hit_tokens: 7,
        draft_tokens_accepted: 9,
        stale_dropped: 3,
        stages: vec![stage("a", 1.5), stage("b", 2.0)],
        ..ClusterStatus::default()
    };
    m.set_cluster(&status);
    status.stages = vec![stage("c", 0.25)];
    m.set_cluster(&status);
    let text = m.render();
    assert!(line(&text, "millrace_prompt_tokens_total{").ends_with(" 10"));
    assert!(line(&text, "millrace_preemptions_total{").ends_with(" 5"));
    assert!(line(&text, "millrace_prefix_cache_hit_tokens_total{").ends_with(" 7"));
    assert!(line(&text, "millrace_draft_tokens_accepted_total{").ends_with(" 9"));
    assert!(line(&text, "millrace_stale_epoch_dropped_total{").ends_with(" 3"));
    assert!(line(&text, "millrace_kv_cache_usage_ratio{").ends_with(" 0.25"));
    assert!(line(&text, "millrace_plan_epoch{").ends_with(" 4"));
    let busy: Vec<_> =
        text.lines().filter(|l| l.starts_with("millrace_stage_busy_seconds_total{")).collect();
    assert_eq!(busy.len(), 1, "{busy:?}");
    assert!(busy[0].contains("node=\"c\"") && busy[0].ends_with(" 0.25"), "{busy:?}");
    let ratio = line(&text, "millrace_stage_busy_ratio{").rsplit(' ').next().map(str::parse::<f64>);
    assert!(matches!(ratio, Some(Ok(r)) if f64::abs(r - 0.25 / 9.0) < 1e-9), "{ratio:?}");
}
