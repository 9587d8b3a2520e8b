//! Who may do what, and how much: the [`Service`] in front of the real one.
//!
//! Knows API keys, what their scopes allow and what their limits leave; counts guesses of keys by
//! host; makes and revokes keys and join tokens, and keeps nodes out. It knows nothing of models or schedules. A
//! key is looked up at every call, so a revoked one ends with the next call. A host that has sent
//! too many wrong keys is told to wait with the next wrong one; right ones never wait, for behind one
//! address there may be many clients, and nobody finds 256 random bits by trying.

mod account;
mod invitations;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use millrace_net::budget::{Budgets, Rate};
use millrace_net::keys::ApiKeyStore;
use millrace_net::revoked::Revocations;
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::id::{NodeId, RequestId};
use millrace_shared::sampling::SamplingParams;
use millrace_shared::wire::admin::{
    AdminReply, AdminRequest, KeyRequest, NodeStatus, Scope, TokenRequest,
};
use millrace_shared::wire::rpc::{
    AttachRequest, ClusterStatus, EmbedRequest, GenerateRequest, ModelCard, PositionScore, Prompt,
    ScoreRequest,
};
use tokio::time::Instant;

pub use self::account::Accounts;
use self::account::Holder;
pub use self::invitations::Invitations;
use crate::service::{Caller, Embeddings, EventStream, Framing, Meter, Service};
use crate::state::unix_now;
use crate::text::TokenizerInfo;

/// Wrong keys from one host: a person who mistypes is not kept waiting, a search is.
const GUESSES: Rate = Rate { burst: 20.0, per_second: 0.5 };
/// How often the times of uses are written.
const SAVE_USES: Duration = Duration::from_secs(60);

/// See the module's documentation.
pub struct Gate<S> {
    inner: Arc<S>,
    keys: Arc<ApiKeyStore>,
    revoked: Arc<Revocations>,
    guesses: Mutex<Budgets>,
    accounts: Arc<Accounts>,
    invitations: Invitations,
}

impl<S> fmt::Debug for Gate<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

fn unauthenticated(message: &str) -> Status {
    Status::new(ErrorCode::Unauthenticated, message)
}

fn lacks(scope: Scope, need: Scope) -> Status {
    let message = match need {
        Scope::Admin => {
            "this key may not change the cluster: use the one in the coordinator's client.toml, or \
             make one with 'millrace-coordinator key create --scope admin'"
                .to_owned()
        }
        _ => format!("this key's scope is '{scope}', and this needs '{need}': use another key"),
    };
    Status::new(ErrorCode::PermissionDenied, message)
}

/// Whether the log is to say who asked.
fn changes_something(request: &AdminRequest) -> bool {
    use AdminRequest as R;
    match request {
        R::Cordon { .. } | R::Uncordon { .. } | R::RevokeNode { .. } | R::Drain { .. } => true,
        R::Keys(request) => *request != KeyRequest::List,
        R::Tokens(request) => *request != TokenRequest::List,
        R::Recut { apply } => *apply,
        R::Nodes | R::Doctor | R::Describe | R::Requests(_) | R::Collect { .. } => false,
    }
}

impl<S: Service> Gate<S> {
    /// A gate in front of `inner`. What runs already is in the `accounts`.
    pub fn new(
        inner: Arc<S>,
        keys: Arc<ApiKeyStore>,
        revoked: Arc<Revocations>,
        accounts: Arc<Accounts>,
        invitations: Invitations,
    ) -> Self {
        let guesses = Mutex::new(Budgets::new(GUESSES));
        Self { inner, keys, revoked, guesses, accounts, invitations }
    }

    /// Looks the key up, and remembers its holder.
    fn holder(&self, key: Option<&str>) -> Result<Arc<Holder>, Status> {
        let secret = key.ok_or_else(|| {
            unauthenticated(
                "an API key is required: send 'Authorization: Bearer KEY' (keys are made with \
                 'millrace keys create' or 'millrace-coordinator key create')",
            )
        })?;
        let client = Caller::client_of(key);
        let found = self.keys.verify(secret, unix_now()).map_err(|e| {
            tracing::error!("API keys: {e}");
            Status::unavailable("the coordinator cannot read its API keys: see its log", 1000)
        })?;
        let Some(found) = found else {
            self.accounts.close(client);
            return Err(unauthenticated("the API key is not valid (unknown, revoked or expired)"));
        };
        Ok(self.accounts.open(client, found, Instant::now()))
    }

    /// Checks a key from this address, which may not be wrong too often.
    fn guess(&self, key: Option<&str>, from: IpAddr, now: Instant) -> Result<(), Status> {
        let Err(status) = self.authenticate(key) else { return Ok(()) };
        if key.is_none() || status.code != ErrorCode::Unauthenticated {
            return Err(status);
        }
        let mut guesses = lock(&self.guesses);
        let wait = guesses.wait_ms(from, now);
        if wait > 0 {
            return Err(Status::exhausted("too many wrong API keys from this address", wait));
        }
        guesses.take_of(from, now);
        Err(status)
    }

    /// The holder of a key that was shown before.
    fn shown(&self, client: u64) -> Result<Arc<Holder>, Status> {
        let holder = self.accounts.of(client);
        holder.ok_or_else(|| unauthenticated("the API key is not valid"))
    }

    /// The same, if it may use the model.
    fn known(&self, caller: &mut Caller) -> Result<Arc<Holder>, Status> {
        let holder = self.shown(caller.client)?;
        let scope = holder.scope();
        if scope < Scope::Generate {
            return Err(lacks(scope, Scope::Generate));
        }
        caller.admin = scope == Scope::Admin;
        Ok(holder)
    }

    fn keys(&self, request: KeyRequest) -> Result<AdminReply, Status> {
        let failed = |e: millrace_net::NetError| match e {
            millrace_net::NetError::Protocol(what) => Status::invalid("key", what),
            other => {
                tracing::error!("API keys: {other}");
                Status::internal("the coordinator cannot use its key store: see its log")
            }
        };
        match request {
            KeyRequest::List => {}
            KeyRequest::Create(key) => {
                let (info, secret) = self.keys.create(&key, unix_now()).map_err(failed)?;
                tracing::info!(id = %info.id, name = ?key.name, scope = %key.scope, "key made");
                return Ok(AdminReply::NewKey { info, secret });
            }
            KeyRequest::Revoke { id } => {
                if !self.keys.revoke(&id).map_err(failed)? {
                    let message = format!("no key has the id '{id}'");
                    return Err(Status::new(ErrorCode::NotFound, message));
                }
                tracing::info!(%id, "key revoked");
            }
        }
        Ok(AdminReply::Keys(self.keys.list().map_err(failed)?))
    }

    /// Keeps a node out, and has its connection closed where it is there.
    async fn revoke_node(&self, key: Option<&str>, node: String) -> Result<AdminReply, Status> {
        let present = match self.inner.admin(key, AdminRequest::Nodes).await? {
            AdminReply::Nodes(nodes) => nodes,
            _ => Vec::new(),
        };
        // What is an id is nobody's name, whatever a node calls itself.
        let id = node.parse::<NodeId>().ok();
        let is_meant = |n: &&NodeStatus| id.map_or(n.name == node, |id| n.id == id);
        let named: Vec<_> = present.iter().filter(is_meant).collect();
        let (id, name) = match (&named[..], id) {
            ([one], _) => (one.id, one.name.as_str()),
            ([], Some(id)) => (id, ""),
            ([], None) => {
                let message = format!(
                    "no node is called '{node}' now; one that is not there is named by its id, \
                     which the coordinator's log tells"
                );
                return Err(Status::new(ErrorCode::NotFound, message));
            }
            _ => {
                let message = format!("{} nodes are called '{node}': name its id", named.len());
                return Err(Status::invalid("node", message));
            }
        };
        self.revoked.revoke(id, name, unix_now()).map_err(|e| {
            tracing::error!("revocations: {e}");
            Status::internal(format!("the revocation is not on disk, and ends at a restart: {e}"))
        })?;
        tracing::warn!(node = %id, name = ?name, "node revoked");
        self.inner.admin(key, AdminRequest::RevokeNode { node: id.to_string() }).await
    }
}

/// Writes, now and then, when keys were used. Never ends.
pub async fn keep_uses(keys: Arc<ApiKeyStore>) {
    loop {
        tokio::time::sleep(SAVE_USES).await;
        let keys = Arc::clone(&keys);
        let saved = tokio::task::spawn_blocking(move || keys.save_uses()).await;
        if let Ok(Err(e)) = saved {
            tracing::warn!("when keys were used is not written: {e}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Service> Service for Gate<S> {
    fn generate(
        &self,
        request: GenerateRequest,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        async move {
            request.choices.validate()?;
            let holder = self.known(&mut caller)?;
            if let Some(id) = caller.request_id
                && self.inner.knows(id, caller.clone()).await
            {
                // It was counted when it was first submitted, and still is while it runs.
                return self.inner.generate(request, Caller { again: true, ..caller }).await;
            }
            let pass = holder.admit(request.choices.best_of, Instant::now())?;
            Ok(self.inner.generate(request, caller).await?.metered(Box::new(pass)))
        }
        .boxed()
    }

    fn attach(
        &self,
        request: AttachRequest,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        async move {
            // It was counted when it was submitted, and still is while it runs.
            self.known(&mut caller)?;
            self.inner.attach(request, caller).await
        }
        .boxed()
    }

    fn score(
        &self,
        request: ScoreRequest,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>> {
        async move {
            let pass = self.known(&mut caller)?.admit(1, Instant::now())?;
            pass.charge(request.tokens.len(), Instant::now());
            self.inner.score(request, caller).await
        }
        .boxed()
    }

    fn ruled(&self, prompt: Prompt) -> BoxFuture<'_, Result<Prompt, Status>> {
        self.inner.ruled(prompt)
    }

    fn embed(
        &self,
        request: EmbedRequest,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<Embeddings, Status>> {
        async move {
            // However many texts: of one call only some are computed at a time.
            let pass = self.known(&mut caller)?.admit(1, Instant::now())?;
            let embeddings = self.inner.embed(request, caller).await?;
            let tokens = embeddings.prompt_tokens.iter().map(|&n| n as usize).sum();
            pass.charge(tokens, Instant::now());
            Ok(embeddings.metered(Box::new(pass)))
        }
        .boxed()
    }

    fn admit(&self, caller: Caller) -> Result<Option<Box<dyn Meter>>, Status> {
        let pass = self.shown(caller.client)?.admit(1, Instant::now())?;
        Ok(Some(Box::new(pass)))
    }

    fn tokenize(&self, model: &str, prompt: &Prompt, framing: Framing) -> Result<Vec<u32>, Status> {
        self.inner.tokenize(model, prompt, framing)
    }

    fn tokenizer_info(&self) -> TokenizerInfo {
        self.inner.tokenizer_info()
    }

    fn detokenize(&self, ids: &[u32]) -> Result<String, Status> {
        self.inner.detokenize(ids)
    }

    fn sampling(&self) -> SamplingParams {
        self.inner.sampling()
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.token_bytes(id)
    }

    fn models(&self) -> Vec<ModelCard> {
        self.inner.models()
    }

    fn cancel(
        &self,
        request_id: RequestId,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<(), Status>> {
        async move {
            self.known(&mut caller)?;
            self.inner.cancel(request_id, caller).await
        }
        .boxed()
    }

    fn forget(
        &self,
        request_id: RequestId,
        mut caller: Caller,
    ) -> BoxFuture<'_, Result<(), Status>> {
        async move {
            self.known(&mut caller)?;
            self.inner.forget(request_id, caller).await
        }
        .boxed()
    }

    fn status(&self) -> BoxFuture<'_, ClusterStatus> {
        self.inner.status()
    }

    fn admin(
        &self,
        key: Option<&str>,
        request: AdminRequest,
    ) -> BoxFuture<'_, Result<AdminReply, Status>> {
        let holder = self.holder(key);
        let key = key.map(str::to_owned);
        async move {
            let holder = holder?;
            match holder.scope() {
                Scope::Admin => {}
                scope => return Err(lacks(scope, Scope::Admin)),
            }
            if changes_something(&request) {
                tracing::info!(by = holder.id(), ?request, "an administrator asks");
            }
            match request {
                AdminRequest::Keys(request) => self.keys(request),
                AdminRequest::Tokens(request) => self.invitations.answer(request, unix_now()),
                AdminRequest::RevokeNode { node } => self.revoke_node(key.as_deref(), node).await,
                other => self.inner.admin(key.as_deref(), other).await,
            }
        }
        .boxed()
    }

    fn authenticate(&self, key: Option<&str>) -> Result<(), Status> {
        self.holder(key).map(|_| ())
    }

    fn authenticate_from(&self, key: Option<&str>, from: IpAddr) -> Result<(), Status> {
        self.guess(key, from, Instant::now())
    }
}

#[cfg(test)]
mod tests;
