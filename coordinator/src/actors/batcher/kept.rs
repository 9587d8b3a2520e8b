//! What outlives a connection, a request or the coordinator: attaching, ended requests, and requests
//! of an earlier life.

use std::sync::Arc;
use std::time::Duration;

use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{RequestId, SequenceId};
use millrace_shared::scheduler::{Kind, NewSequence, Rejected, Scheduler};

use super::embeddings::embed_of;
use super::inbox::Submit;
use super::{Batcher, RETRY_QUEUE_MS};
use crate::journal::{End, Entry, Head, JournalMode, Record, unix_ms};
use crate::request::{Generation, Request, Work, play_again};
use crate::service::{EventStream, Meter};
use crate::text::rules::AnswerRules;

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

/// Lets requests with the same rules share what these compile to.
fn share_rules(known: &mut Vec<AnswerRules>, entry: &mut Entry) {
    let Some(of) = &entry.head.rules else { return };
    match known.iter().find(|rules| *rules == of).cloned() {
        None => known.push(of.clone()),
        same => Arc::make_mut(&mut entry.head).rules = same,
    }
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
            choices: m.choices.best_of,
            client: m.caller.client,
            priority: m.caller.priority,
            submitted_ms: now,
            deadline_ms: m.caller.deadline.map(|d| now.saturating_add(ms(d))),
            keep_ms: m.caller.keep.or(named).map_or(0, ms),
            digest: m.digest,
            tag: m.caller.tag,
            n: m.choices.n,
            calls: m.calls.clone(),
            note: m.caller.note.to_vec(),
            rules: m.rules.clone(),
            left_out: m.left_out,
            altered: m.altered,
        })
    }

    /// The request of this id, whether it runs or has ended.
    pub(super) fn head_of_known(&self, id: RequestId) -> Option<Arc<Head>> {
        match self.requests.named(id).map(|r| &r.work) {
            Some(Work::Generate(g)) => Some(Arc::clone(g.head())),
            _ => self.retained.get(id).map(|e| Arc::clone(&e.head)),
        }
    }

    /// Whether the request of this id has ended with what is worth another try.
    pub(super) fn is_tried_again(&self, id: RequestId) -> bool {
        self.retained.get(id).is_some_and(is_worth_another_try)
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
            return Some(self.attach(id, Vec::new(), true));
        }
        Some(Err(Status::invalid(
            "request_id",
            format!(
                "the id {id} is in use for another request: draw a new one for every request, and \
                 use it again only to send the very same one"
            ),
        )))
    }

    /// The events of a known request, of each choice from the token in `from` on. `returns` says that
    /// it may be a client whose connection was lost.
    pub(super) fn attach(
        &mut self,
        id: RequestId,
        from: Vec<u32>,
        returns: bool,
    ) -> Result<EventStream, Status> {
        if let Some(Work::Generate(generation)) = self.requests.named_mut(id).map(|r| &mut r.work) {
            return generation.listen(from, returns, &self.journal);
        }
        let entry = self.retained.get(id).ok_or_else(|| crate::service::unknown_request(id))?;
        Ok(play_again(entry, from, &self.tokenizer, &self.journal))
    }

    /// Whether requests are kept at all.
    fn keeps(&self) -> bool {
        self.journal.config().mode != JournalMode::Off
    }

    /// Whether a request that begins with so many bytes has room in the journal; nothing is erased
    /// for it yet.
    pub(super) fn check_room(&self, first: u64) -> Result<(), Status> {
        if !self.keeps() {
            return Ok(());
        }
        self.retained.check_room(first, RETRY_QUEUE_MS)
    }

    /// Promises a request that runs room in the journal, which ended ones make.
    pub(super) fn promise(&mut self, bytes: u64) {
        if self.keeps() {
            let erased = self.retained.promise(bytes);
            self.erase(erased);
        }
    }

    /// Keeps a request that has ended, as long as the configuration says.
    pub(super) fn put_away(&mut self, request: Request) {
        let Work::Generate(generation) = request.work else { return };
        self.metrics.on_rules_of_answer(generation.rules_did());
        if let Some(span) = request.span {
            self.metrics.spans().end(span, &generation);
        }
        if self.keeps() {
            self.retained.release(generation.promised_bytes());
        }
        let erased = self.retained.keep(generation.entry());
        self.erase(erased);
    }

    /// Forgets a request that has ended; whether there was one.
    pub(super) fn erase_ended(&mut self, id: RequestId) -> bool {
        let forgotten = self.retained.forget_if(id, |_| true);
        if forgotten {
            self.erase(vec![id]);
        }
        forgotten
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
            let running = self.requests.iter().filter_map(|r| match &r.work {
                Work::Generate(g) => Some(g.entry()),
                Work::Score(_) | Work::Embed(_) => None,
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
        let mut rules: Vec<AnswerRules> = Vec::new();
        for mut entry in entries {
            share_rules(&mut rules, &mut entry);
            if entry.head.model != self.model {
                tracing::warn!(request_id = %entry.head.id, "it was of another model, and is erased");
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
        let patience = self.recovery;
        let generation = Generation::restored(entry, &self.tokenizer, patience, &self.journal);
        let first = self.next_sequence;
        let sequences: Vec<_> = (first..).map(SequenceId).zip(generation.open()).collect();
        self.next_sequence += sequences.len() as u64;
        let before = Duration::from_millis(now_ms.saturating_sub(head.submitted_ms));
        let left = |at: u64| Duration::from_millis(at.saturating_sub(now_ms));
        self.promise(generation.promised_bytes());
        let request = Request {
            id: head.id,
            // What its client said of its trace is not kept.
            span: None,
            sequences,
            chunks: Vec::new(),
            work: Work::Generate(Box::new(generation)),
            submitted: Duration::ZERO,
            before,
            deadline: head.deadline_ms.map(left),
        };
        if request.sequences.is_empty() {
            return self.put_away(request);
        }
        self.resumed.extend(request.sequences.iter().map(|(sequence, _)| *sequence));
        self.requests.insert(request);
    }

    /// Has each request of an earlier life counted by what `meter` gives, until it ends.
    #[must_use]
    pub fn counting(mut self, meter: impl Fn(&Head) -> Box<dyn Meter>) -> Self {
        for request in self.requests.iter_mut() {
            if let Work::Generate(generation) = &mut request.work {
                let meter = meter(generation.head());
                generation.counted(meter);
            }
        }
        self
    }

    /// Gives the requests of an earlier life to the first scheduler; returns those that it refuses.
    pub(super) fn resume(&mut self, scheduler: &mut Scheduler) -> Vec<(SequenceId, Rejected)> {
        let mut refused = Vec::new();
        for id in std::mem::take(&mut self.resumed) {
            let Some((request, choice)) = self.requests.of(id) else { continue };
            let generation = match &request.work {
                Work::Generate(generation) => generation,
                Work::Embed(work) => {
                    let new = embed_of(request, work, choice, id);
                    refused.extend(scheduler.handle_resume(new, &[]).err().map(|why| (id, why)));
                    continue;
                }
                Work::Score(_) => continue,
            };
            let head = generation.head();
            let new = NewSequence {
                id,
                prompt: head.prompt.clone(),
                max_new_tokens: head.max_new,
                kind: match head.params.grammar {
                    Some(_) => Kind::Constrained,
                    None => Kind::Generate,
                },
                submitted: request.submitted,
                deadline: request.deadline,
                client: head.client,
                priority: head.priority,
            };
            let is_first = request.sequences.first().is_some_and(|(first, _)| *first == id);
            match scheduler.handle_resume(new, &generation.token_ids(choice)) {
                Ok(()) if is_first => self.metrics.on_submit(),
                Ok(()) => {}
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
        self.early.clear();
        let all: Vec<RequestId> = self.requests.iter().map(|r| r.id).collect();
        for id in all {
            let Some(mut request) = self.end(id) else { continue };
            if let Work::Score(_) | Work::Embed(_) = request.work {
                let code = ErrorCode::Unavailable;
                request.fail(Status::new(code, "the coordinator stops"), &self.journal);
            }
        }
    }
}
