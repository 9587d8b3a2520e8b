//! Clients in a closed loop: each sends a request, waits for the whole answer, sends the next. All
//! times are the clients' own: what a user of the cluster would see.

use std::cell::RefCell;
use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime};

use anyhow::ensure;
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::rpc::{Choices, GenerateEvent, GenerateRequest, Prompt};

use super::pseudo_tokens;
use crate::target::{Caller, Session};

/// Longest time a histogram can hold, microseconds: an hour.
const MAX_US: u64 = 3_600_000_000;

/// What each client asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) prompt_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) requests: u32,
    pub(super) vocab: u32,
    /// Tokens after which a prompt says the same again; `None` for prompts that never do.
    pub(super) period: Option<u32>,
}

impl Load {
    /// A prompt; another one for every `stream`.
    fn prompt(&self, stream: u64) -> Vec<u32> {
        let length = self.prompt_tokens as usize;
        match self.period {
            Some(period) => {
                let said = pseudo_tokens(stream, period as usize, self.vocab);
                said.into_iter().cycle().take(length).collect()
            }
            None => pseudo_tokens(stream, length, self.vocab),
        }
    }
}

/// What all clients of a run saw.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) wall: Duration,
    pub(super) requests: u64,
    pub(super) tokens: u64,
    pub(super) ttft_us: Histogram<u64>,
    pub(super) inter_token_us: Histogram<u64>,
    /// From each request to its first token, counted from the start of the run.
    waits: Vec<(Duration, Duration)>,
}

impl Seen {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            wall: Duration::ZERO,
            requests: 0,
            tokens: 0,
            ttft_us: Histogram::new_with_max(MAX_US, 3)?,
            inter_token_us: Histogram::new_with_max(MAX_US, 3)?,
            waits: Vec::new(),
        })
    }

    fn add(&mut self, start: Instant, answer: &Timeline) {
        let Some(&first) = answer.tokens.first() else { return };
        self.requests += 1;
        self.tokens += answer.tokens.len() as u64;
        self.ttft_us.saturating_record(micros(first - answer.sent));
        for pair in answer.tokens.windows(2) {
            self.inter_token_us.saturating_record(micros(pair[1] - pair[0]));
        }
        self.waits.push((answer.sent - start, first - start));
    }

    /// Time in which at least one client waited for its first token.
    pub(super) fn prefilling(&self) -> Duration {
        union(self.waits.clone())
    }
}

fn micros(d: Duration) -> u64 {
    d.as_micros().try_into().unwrap_or(u64::MAX)
}

/// Length of the union of intervals.
fn union(mut intervals: Vec<(Duration, Duration)>) -> Duration {
    intervals.sort();
    let mut covered = Duration::ZERO;
    let mut end = Duration::ZERO;
    for (from, to) in intervals {
        covered += to.saturating_sub(from.max(end));
        end = end.max(to);
    }
    covered
}

/// When things happened to one request.
#[derive(Debug)]
struct Timeline {
    sent: Instant,
    tokens: Vec<Instant>,
}

/// Connected clients, one connection each.
pub(super) struct Clients {
    callers: Vec<Caller>,
    load: Load,
    /// Number of the last prompt: none is sent twice, so no cache can help.
    prompts: u64,
}

impl Clients {
    pub(super) async fn connect(session: &Session, load: Load, count: u32) -> anyhow::Result<Self> {
        let callers = try_join_all((0..count).map(|_| session.caller())).await?;
        // A running cluster may still hold the prompts of an earlier run.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first = if session.embedded().is_some() { 0 } else { since.as_secs() << 20 };
        Ok(Self { callers, load, prompts: first })
    }

    /// Connects more clients. Only just before they are needed: the cluster closes a connection that
    /// asks for nothing.
    pub(super) async fn add(&mut self, session: &Session, count: u32) -> anyhow::Result<()> {
        self.callers.extend(try_join_all((0..count).map(|_| session.caller())).await?);
        Ok(())
    }

    /// One request whose times do not count.
    pub(super) async fn warm_up(&mut self) -> anyhow::Result<()> {
        self.prompts += 1;
        request(&self.callers[0], self.load, self.load.prompt(self.prompts)).await.map(drop)
    }

    /// Runs this many of the clients until each has all its answers.
    pub(super) async fn run(&mut self, concurrency: u32) -> anyhow::Result<Seen> {
        self.run_beside(concurrency, None).await.map(|(seen, _)| seen)
    }

    /// The same while all the other clients ask for `others`, one after the other, until the first
    /// ones have all their answers. What each group saw; of the others only whole answers count.
    pub(super) async fn run_beside(
        &mut self,
        concurrency: u32,
        others: Option<Load>,
    ) -> anyhow::Result<(Seen, Seen)> {
        let (load, start) = (self.load, Instant::now());
        let streams = RefCell::new(self.prompts);
        let next = || {
            *streams.borrow_mut() += 1;
            *streams.borrow()
        };
        let beside = RefCell::new(Vec::new());
        let client = async |caller: &Caller| -> anyhow::Result<Vec<Timeline>> {
            let mut answers = Vec::new();
            for _ in 0..load.requests {
                answers.push(request(caller, load, load.prompt(next())).await?);
            }
            Ok(answers)
        };
        let other = async |(caller, load): (&Caller, Load)| -> anyhow::Result<Infallible> {
            loop {
                let answer = request(caller, load, load.prompt(next())).await?;
                beside.borrow_mut().push(answer);
            }
        };
        let (first, rest) = self.callers.split_at(concurrency as usize);
        let running = try_join_all(first.iter().map(client));
        let endless = try_join_all(rest.iter().filter_map(|c| Some((c, others?))).map(other));
        let answers = if others.is_some() {
            tokio::select! {
                answers = running => answers?,
                failed = endless => return Err(failed.map_or_else(|e| e, |_| anyhow::anyhow!("no other clients"))),
            }
        } else {
            running.await?
        };
        let wall = start.elapsed();
        self.prompts = *streams.borrow();
        let collect = |answers: &[Timeline]| -> anyhow::Result<Seen> {
            let mut seen = Seen { wall, ..Seen::new()? };
            answers.iter().for_each(|a| seen.add(start, a));
            Ok(seen)
        };
        let answers: Vec<Timeline> = answers.into_iter().flatten().collect();
        Ok((collect(&answers)?, collect(&beside.borrow())?))
    }

    /// A request from each of this many clients at once; all prompts begin with the same `shared`
    /// tokens, those of the stream `beginning`.
    pub(super) async fn run_shared(
        &mut self,
        clients: u32,
        (beginning, shared): (u64, u32),
    ) -> anyhow::Result<Seen> {
        let load = self.load;
        let beginning = pseudo_tokens(beginning, shared as usize, load.vocab);
        let prompts = self.prompts;
        self.prompts += u64::from(clients);
        let start = Instant::now();
        let client = async |(i, caller): (usize, &Caller)| {
            let own = (load.prompt_tokens - shared) as usize;
            let end = pseudo_tokens(prompts + 1 + i as u64, own, load.vocab);
            request(caller, load, [beginning.as_slice(), &end].concat()).await
        };
        let running = self.callers.iter().take(clients as usize).enumerate().map(client);
        let answers = try_join_all(running).await?;
        let mut seen = Seen { wall: start.elapsed(), ..Seen::new()? };
        answers.iter().for_each(|a| seen.add(start, a));
        Ok(seen)
    }

    /// A stream that no prompt of this run and no earlier run has begun with.
    pub(super) fn fresh_stream(&mut self) -> u64 {
        self.prompts += 1;
        self.prompts
    }
}

async fn request(caller: &Caller, load: Load, ids: Vec<u32>) -> anyhow::Result<Timeline> {
    let params = SamplingParams {
        max_tokens: Some(load.max_tokens),
        ignore_eos: true,
        ..SamplingParams::greedy()
    };
    let request = GenerateRequest {
        model: String::new(),
        prompt: Prompt::Tokens(ids),
        params,
        choices: Choices::default(),
    };
    let mut timeline = Timeline { sent: Instant::now(), tokens: Vec::new() };
    let mut events = caller.generate(request).await?;
    while let Some(event) = events.next().await? {
        if let GenerateEvent::Token { .. } = event {
            timeline.tokens.push(Instant::now());
        }
    }
    ensure!(
        timeline.tokens.len() == load.max_tokens as usize,
        "an answer has {} tokens instead of {}: is the context of the model long enough for --prompt-tokens and --max-tokens together?",
        timeline.tokens.len(),
        load.max_tokens
    );
    Ok(timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_waits_count_once() {
        let ms = Duration::from_millis;
        let waits = vec![(ms(20), ms(30)), (ms(0), ms(10)), (ms(5), ms(8)), (ms(25), ms(40))];
        assert_eq!(union(waits), ms(30));
        assert_eq!(union(Vec::new()), Duration::ZERO);
    }
}
