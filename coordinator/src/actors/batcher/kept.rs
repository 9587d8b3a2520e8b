//! What outlives a connection, a request or the coordinator: attaching, ended requests, and requests
//! of an earlier life.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::sampling::choice_seed;
use millrace_shared::scheduler::{Kind, NewSequence, Rejected, Scheduler};

use super::inbox::Submit;
use super::{Batcher, RETRY_QUEUE_MS};
use crate::journal::{End, Entry, Head, JournalMode, Record, unix_ms};
use crate::request::{Generation, Request, Work, play_again};
use crate::service::EventStream;

/// Whether a request ended for reasons that were not its own: sent again, it is computed again.
fn is_worth_another_try(entry: &Entry) -> bool {
    use ErrorCode as E;
    let again = |status: &Status| {
        matches!(
            status.code,
            E::Unavailable | E::ResourceExhausted | E::DeadlineExceeded | E::Cancelled
        )
    };
    entry.ends.iter().flatten().any(|(_, end)| matches!(end, End::Failed(s) if again(s)))
}

impl Batcher {
    /// What the journal keeps of a request that comes now.
    pub(super) fn head_of(&self, id: RequestId, m: &Submit, max_new: u32) -> Arc<Head> {
        let now = unix_ms();
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        // Who names a request means to come back for it.
        let named = m.caller.request_id.map(|_| self.recovery);
        Arc::new(Head {
            id,
            model: self.model,
            prompt: m.tokens.clone(),
            params: m.params.clone(),
            seed: m.seed,
            chat: m.chat,
            max_new,
            choices: 1,
            client: m.caller.client,
            priority: m.caller.priority,
            submitted_ms: now,
            deadline_ms: m.caller.deadline.map(|d| now.saturating_add(ms(d))),
            keep_ms: m.caller.keep.or(named).map_or(0, ms),
            digest: m.digest,
            tag: m.caller.tag,
        })
    }

    /// The request of this id, whether it runs or has ended.
    pub(super) fn head_of_known(&self, id: RequestId) -> Option<Arc<Head>> {
        let running = self.by_id.get(&id).and_then(|s| self.requests.get(s));
        match running.map(|r| &r.work) {
            Some(Work::Generate(g)) => Some(Arc::clone(g.head())),
            _ => self.retained.get(id).map(|e| Arc::clone(&e.head)),
        }
    }

    /// The answer to a request whose id is in use; `None` where it is not.
    pub(super) fn submitted_before(&mut self, m: &Submit) -> Option<Result<EventStream, Status>> {
        // Ids that were drawn here are new.
        let id = m.caller.request_id?;
        let head = self.head_of_known(id)?;
        if head.client == m.caller.client && head.digest == m.digest {
            if self.retained.forget_if(id, is_worth_another_try) {
                self.erase(vec![id]);
                return None;
            }
            return Some(self.attach(id, 0));
        }
        Some(Err(Status::invalid(
            "request_id",
            format!(
                "the id {id} is in use for another request: draw a new one for every request, and \
                 use it again only to send the very same one"
            ),
        )))
    }

    /// The events of a known request, from token `from` on.
    pub(super) fn attach(&mut self, id: RequestId, from: u32) -> Result<EventStream, Status> {
        let running = self.by_id.get(&id).and_then(|s| self.requests.get_mut(s));
        if let Some(Work::Generate(generation)) = running.map(|r| &mut r.work) {
            return generation.listen(from, &self.journal);
        }
        let entry = self.retained.get(id).ok_or_else(|| crate::service::unknown_request(id))?;
        Ok(play_again(entry, from, &self.tokenizer, &self.journal))
    }

    /// Promises a request room in the journal.
    pub(super) fn make_room(&mut self, most: u64) -> Result<(), Status> {
        if self.journal.config().mode == JournalMode::Off {
            return Ok(());
        }
        let Some(erased) = self.retained.admit(most) else {
            return Err(Status::exhausted(
                format!(
                    "the journal's {} MiB are taken by requests that run: try again later, or ask \
                     for fewer tokens (the operator gives it more with --journal-size)",
                    self.journal.config().max_bytes >> 20
                ),
                RETRY_QUEUE_MS,
            ));
        };
        self.erase(erased);
        Ok(())
    }

    /// Keeps a request that has ended, as long as the configuration says.
    pub(super) fn put_away(&mut self, request: Request) {
        let Work::Generate(generation) = request.work else { return };
        if self.journal.config().mode != JournalMode::Off {
            self.retained.release(generation.head().most_bytes());
        }
        let erased = self.retained.keep(generation.entry());
        self.erase(erased);
    }

    fn erase(&self, requests: Vec<RequestId>) {
        for id in requests {
            self.journal.write(|| Record::Erase(id));
        }
    }

    /// Erases what was kept long enough, and helps a journal that could not be written.
    pub(super) fn tidy(&mut self) {
        let old = self.retained.expire(unix_ms());
        self.erase(old);
        self.metrics.set_journal_bytes(self.retained.bytes());
        if self.journal.wants_snapshot() {
            let running = self.requests.values().filter_map(|r| match &r.work {
                Work::Generate(g) => Some(g.entry()),
                Work::Score(_) => None,
            });
            let mut records: Vec<Record> = running.flat_map(|e| e.records()).collect();
            records.extend(self.retained.iter().flat_map(Entry::records));
            self.journal.snapshot(records);
        }
    }

    /// Takes over what an earlier life left: ended requests are kept on, the others wait for a
    /// pipeline as after a loss.
    pub(super) fn restore(&mut self, entries: Vec<Entry>) {
        let now_ms = unix_ms();
        for entry in entries {
            if entry.head.model != self.model {
                tracing::warn!(request = %entry.head.id, "it was of another model, and is erased");
                self.erase(vec![entry.head.id]);
            } else if entry.ended_ms().is_some() {
                let erased = self.retained.keep(entry);
                self.erase(erased);
            } else {
                self.restore_one(entry, now_ms);
            }
        }
        if !self.requests.is_empty() {
            self.suspended = Some(Duration::ZERO);
            let requests = self.requests.len();
            tracing::info!(requests, "requests of an earlier life wait for the pipeline");
        }
    }

    fn restore_one(&mut self, entry: Entry, now_ms: u64) {
        let head = Arc::clone(&entry.head);
        let sequence = SequenceId(self.next_sequence);
        self.next_sequence += 1;
        let (mut generation, ended) = Generation::restored(entry, &self.tokenizer, self.recovery);
        if let Some(reason) = ended {
            generation.finish(reason, &self.journal);
        }
        let before = Duration::from_millis(now_ms.saturating_sub(head.submitted_ms));
        let left = |at: u64| Duration::from_millis(at.saturating_sub(now_ms));
        let request = Request {
            id: head.id,
            sequence,
            work: Work::Generate(Box::new(generation)),
            seed: choice_seed(head.seed, 0),
            submitted: Duration::ZERO,
            before,
            deadline: head.deadline_ms.map(left),
        };
        // What a running request may come to was promised in its first life.
        if self.journal.config().mode != JournalMode::Off {
            let erased = self.retained.promise(head.most_bytes());
            self.erase(erased);
        }
        if ended.is_some() {
            return self.put_away(request);
        }
        self.by_id.insert(head.id, sequence);
        self.requests.insert(sequence, request);
        self.resumed.push(sequence);
    }

    /// Gives the requests of an earlier life to the first scheduler; returns those that it refuses.
    pub(super) fn resume(&mut self, scheduler: &mut Scheduler) -> Vec<(SequenceId, Rejected)> {
        let mut refused = Vec::new();
        for id in std::mem::take(&mut self.resumed) {
            let Some(request) = self.requests.get(&id) else { continue };
            let Work::Generate(generation) = &request.work else { continue };
            let head = generation.head();
            let new = NewSequence {
                id,
                prompt: head.prompt.clone(),
                max_new_tokens: head.max_new,
                kind: Kind::Generate,
                submitted: request.submitted,
                deadline: request.deadline,
                client: head.client,
                priority: head.priority,
            };
            match scheduler.handle_resume(new, &generation.token_ids()) {
                Ok(()) => self.metrics.on_submit(),
                Err(why) => refused.push((id, why)),
            }
        }
        refused
    }

    /// Refuses what comes once requests were left to the next life.
    pub(super) fn refuse_while_leaving(&self) -> Result<(), Status> {
        let stops =
            || Status::unavailable("the coordinator stops: try again when it is back", 1000);
        if self.leaving { Err(stops()) } else { Ok(()) }
    }

    /// Whether requests outlive this process.
    pub(super) fn survives(&self) -> bool {
        self.journal.config().mode == JournalMode::Disk && !self.journal.is_degraded()
    }

    /// The coordinator stops: requests that run stay in the journal as they are, and whoever listens
    /// sees the stream break off, to attach again.
    pub(super) fn leave_to_the_next_life(&mut self) {
        self.suspended = None;
        self.leaving = true;
        let all: Vec<SequenceId> = self.requests.keys().copied().collect();
        for sequence in all {
            let Some(mut request) = self.end(sequence) else { continue };
            if let Work::Score(_) = request.work {
                let code = ErrorCode::Unavailable;
                request.fail(Status::new(code, "the coordinator stops"), &self.journal);
            }
        }
    }
}
