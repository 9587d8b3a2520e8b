//! What each key has left: requests and tokens a minute, requests at once.
//!
//! Requests run in the account of the key that submitted them, also those that the journal kept of an
//! earlier life, and those whose key was revoked meanwhile: a revoked key begins nothing new, and what
//! it began ends by itself, or when nobody who may listen comes back for it. Invariant: a place that
//! was taken is given back exactly once, by the [`Pass`] that holds it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_net::budget::{Bucket, Rate};
use millrace_net::keys::ApiKey;
use millrace_shared::error::Status;
use millrace_shared::wire::admin::{KeyLimits, Scope};
use millrace_shared::wire::rpc::GenerateEvent;
use tokio::time::Instant;

use crate::service::Meter;

/// When to try again, told to callers with too many requests at once.
const BUSY_RETRY_MS: u32 = 1000;

/// The accounts of all keys, by [`Caller::client`](crate::service::Caller::client).
#[derive(Debug, Default)]
pub struct Accounts {
    /// Keys that were good when they were last shown; at most one for each secret that was ever made.
    holders: Mutex<HashMap<u64, Arc<Holder>>>,
    running: Arc<Running>,
}

impl Accounts {
    /// The holder of a key that is good now.
    pub(super) fn open(&self, client: u64, key: ApiKey, now: Instant) -> Arc<Holder> {
        let mut holders = lock(&self.holders);
        if let Some(holder) = holders.get(&client).filter(|h| h.key == key) {
            return Arc::clone(holder);
        }
        let holder = Arc::new(Holder::new(client, key, Arc::clone(&self.running), now));
        holders.insert(client, Arc::clone(&holder));
        holder
    }

    /// The key is not good any more; what it began goes on.
    pub(super) fn close(&self, client: u64) {
        lock(&self.holders).remove(&client);
    }

    /// The holder of a key that was good when it was last shown.
    pub(super) fn of(&self, client: u64) -> Option<Arc<Holder>> {
        lock(&self.holders).get(&client).cloned()
    }

    /// Choices that run in the account of this client.
    #[cfg(test)]
    pub(super) fn running(&self, client: u64) -> u32 {
        self.running.of(client)
    }

    /// Counts a request of so many choices, which an earlier life let in, until what is returned is
    /// dropped; its tokens too, from when its key is shown in this life.
    pub fn resumed(self: &Arc<Self>, client: u64, choices: u32) -> Box<dyn Meter> {
        self.running.add(client, choices);
        let place = Place { running: Arc::clone(&self.running), client, choices };
        Box::new(Resumed { accounts: Arc::clone(self), place })
    }
}

/// Choices that run, by client; none of those that have none.
#[derive(Debug, Default)]
struct Running(Mutex<HashMap<u64, u32>>);

impl Running {
    fn add(&self, client: u64, choices: u32) {
        let mut all = lock(&self.0);
        let running = all.entry(client).or_default();
        *running = running.saturating_add(choices);
    }

    fn of(&self, client: u64) -> u32 {
        lock(&self.0).get(&client).copied().unwrap_or_default()
    }

    fn remove(&self, client: u64, choices: u32) {
        let mut all = lock(&self.0);
        let Some(running) = all.get_mut(&client) else { return };
        *running = running.saturating_sub(choices);
        if *running == 0 {
            all.remove(&client);
        }
    }
}

/// Choices that are counted until this is dropped.
#[derive(Debug)]
struct Place {
    running: Arc<Running>,
    client: u64,
    choices: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.running.remove(self.client, self.choices);
    }
}

/// A key in use.
#[derive(Debug)]
pub(super) struct Holder {
    client: u64,
    key: ApiKey,
    left: Mutex<Left>,
    running: Arc<Running>,
}

/// What a key has left this minute.
#[derive(Clone, Copy, Debug)]
struct Left {
    requests: Bucket,
    tokens: Bucket,
}

/// A minute's worth at once.
fn a_minute(limit: u32) -> Rate {
    Rate { burst: f64::from(limit), per_second: f64::from(limit) / 60.0 }
}

impl Holder {
    fn new(client: u64, key: ApiKey, running: Arc<Running>, now: Instant) -> Self {
        let full = |limit: Option<u32>| Bucket::full(a_minute(limit.unwrap_or(1)), now);
        let KeyLimits { requests_per_minute, tokens_per_minute, .. } = key.key.limits;
        let (requests, tokens) = (full(requests_per_minute), full(tokens_per_minute));
        Self { client, key, left: Mutex::new(Left { requests, tokens }), running }
    }

    /// What the key is called in logs.
    pub(super) fn id(&self) -> &str {
        &self.key.id
    }

    /// What the key may do.
    pub(super) fn scope(&self) -> Scope {
        self.key.key.scope
    }

    /// Lets one more request of so many choices in, if the limits leave room for it. Each choice
    /// runs like a request; of those a minute it is one.
    pub(super) fn admit(self: &Arc<Self>, choices: u32, now: Instant) -> Result<Pass, Status> {
        let limits = self.key.key.limits;
        // Whoever is admitted holds it, so that nobody else takes the same place.
        let mut left = lock(&self.left);
        let over = |limit: u32, what: &str, wait: u32| {
            let message = format!("this key may have {limit} {what}: try again later");
            Err(Status::exhausted(message, wait.max(1)))
        };
        if let Some(most) = limits.concurrent.filter(|most| *most > 0 && choices > *most) {
            let message =
                format!("this key may have {most} answers at once, and {choices} are asked for");
            return Err(Status::invalid("n", message));
        }
        let after = self.running.of(self.client).saturating_add(choices);
        if let Some(most) = limits.concurrent.filter(|most| after > *most) {
            return over(most, "requests at once", BUSY_RETRY_MS);
        }
        if let Some(limit) = limits.tokens_per_minute {
            // What the last ones used beyond it is waited for.
            let wait = left.tokens.wait_ms(a_minute(limit), 1.0, now);
            if wait > 0 {
                return over(limit, "tokens a minute", wait);
            }
        }
        if let Some(limit) = limits.requests_per_minute
            && !left.requests.take(a_minute(limit), now)
        {
            let wait = left.requests.wait_ms(a_minute(limit), 1.0, now);
            return over(limit, "requests a minute", wait);
        }
        self.running.add(self.client, choices);
        let place = Place { running: Arc::clone(&self.running), client: self.client, choices };
        Ok(Pass { holder: Arc::clone(self), _place: place })
    }

    fn charge(&self, tokens: usize, now: Instant) {
        if let Some(limit) = self.key.key.limits.tokens_per_minute {
            lock(&self.left).tokens.charge(a_minute(limit), tokens as f64, now);
        }
    }
}

/// A request that was let in, and runs until this is dropped. It goes with the stream of events;
/// where that is lost and the request goes on, with the request.
#[derive(Debug)]
pub(super) struct Pass {
    holder: Arc<Holder>,
    _place: Place,
}

impl Pass {
    /// Counts tokens that were computed for it.
    pub(super) fn charge(&self, tokens: usize, now: Instant) {
        self.holder.charge(tokens, now);
    }
}

impl Meter for Pass {
    fn see(&mut self, event: &GenerateEvent) {
        self.charge(tokens_of(event), Instant::now());
    }
}

/// A request that an earlier life let in.
#[derive(Debug)]
struct Resumed {
    accounts: Arc<Accounts>,
    place: Place,
}

impl Meter for Resumed {
    fn see(&mut self, event: &GenerateEvent) {
        // Where its key was not shown in this life, nothing of what it has left was used.
        if let Some(holder) = self.accounts.of(self.place.client) {
            holder.charge(tokens_of(event), Instant::now());
        }
    }
}

fn tokens_of(event: &GenerateEvent) -> usize {
    match event {
        GenerateEvent::Started { prompt_token_ids, .. } => prompt_token_ids.len(),
        GenerateEvent::Token { .. } => 1,
        GenerateEvent::Finished { usage, .. } => usage.discarded_tokens as usize,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
