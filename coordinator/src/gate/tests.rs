//! Keys, their scopes and limits, against a service that answers everything.

use millrace_net::join::JoinToken;
use millrace_shared::wire::admin::{KeyLimits, NewKey, NodeStatus};
use millrace_shared::wire::rpc::{Choices, FinishReason, GenerateEvent, Timings, Usage};
use uuid::Uuid;

use super::*;
use crate::state::ClusterDir;

/// Answers all requests with two tokens; one node is there.
struct Open;

/// A request that runs already.
const KNOWN: RequestId = RequestId(Uuid::from_u128(9));

const NODE: NodeId = NodeId(Uuid::from_u128(7));

impl Service for Open {
    fn generate(
        &self,
        _: GenerateRequest,
        _: Caller,
    ) -> BoxFuture<'_, Result<EventStream, Status>> {
        async {
            let id = RequestId(Uuid::now_v7());
            let (sender, stream) = EventStream::new(id, 8);
            let prompt_token_ids = vec![1, 2, 3];
            let started = GenerateEvent::Started {
                request_id: id,
                prompt_token_ids,
                seed: 1,
                choices: 1,
                left_out: 0,
            };
            let usage = Usage { prompt_tokens: 3, ..Usage::default() };
            let finished = GenerateEvent::Finished {
                choice: 0,
                reason: FinishReason::Stop,
                text: String::new(),
                calls: Vec::new(),
                usage,
                timings: Timings::default(),
            };
            for event in [started, finished] {
                sender.try_send(Ok(event)).unwrap();
            }
            Ok(stream)
        }
        .boxed()
    }

    fn knows(&self, id: RequestId, _: Caller) -> BoxFuture<'_, bool> {
        async move { id == KNOWN }.boxed()
    }

    fn score(
        &self,
        _: ScoreRequest,
        _: Caller,
    ) -> BoxFuture<'_, Result<Vec<PositionScore>, Status>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn embed(&self, _: EmbedRequest, _: Caller) -> BoxFuture<'_, Result<Embeddings, Status>> {
        async {
            let (reply, receiver) = tokio::sync::oneshot::channel();
            reply.send(Ok(vec![vec![1.0]; 2])).unwrap();
            Ok(Embeddings::new(vec![3, 4], receiver))
        }
        .boxed()
    }

    fn tokenize(&self, _: &str, _: &Prompt, _: Framing) -> Result<Vec<u32>, Status> {
        Ok(Vec::new())
    }

    fn detokenize(&self, _: &[u32]) -> Result<String, Status> {
        Ok(String::new())
    }

    fn token_bytes(&self, _: u32) -> Vec<u8> {
        Vec::new()
    }

    fn models(&self) -> Vec<ModelCard> {
        Vec::new()
    }

    fn cancel(&self, _: RequestId, _: Caller) -> BoxFuture<'_, Result<(), Status>> {
        async { Ok(()) }.boxed()
    }

    fn status(&self) -> BoxFuture<'_, ClusterStatus> {
        async { ClusterStatus::default() }.boxed()
    }

    fn admin(&self, _: Option<&str>, _: AdminRequest) -> BoxFuture<'_, Result<AdminReply, Status>> {
        let node = NodeStatus {
            id: NODE,
            name: "gpu-2".into(),
            host: String::new(),
            address: String::new(),
            hardware: String::new(),
            threads: 1,
            memory_bytes: 1,
            role: millrace_shared::wire::admin::NodeRole::StandBy,
            cordons: Vec::new(),
        };
        async { Ok(AdminReply::Nodes(vec![node])) }.boxed()
    }

    fn authenticate(&self, _: Option<&str>) -> Result<(), Status> {
        panic!("the gate asks nobody");
    }
}

struct Fixture {
    gate: Gate<Open>,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let cluster = ClusterDir::open_or_init(&dir.path().join("c"), "h:8001", "").unwrap();
    let (keys, revoked) = (Arc::clone(&cluster.keys), Arc::clone(&cluster.revoked));
    let invitations = Invitations::of(&cluster, "h:8001");
    let gate = Gate::new(Arc::new(Open), keys, revoked, Arc::default(), invitations);
    Fixture { gate, _dir: dir }
}

impl Fixture {
    /// A key's secret.
    fn key(&self, scope: Scope, limits: KeyLimits) -> (String, String) {
        let key = NewKey { limits, ..NewKey::new("test", scope) };
        let (info, secret) = self.gate.keys.create(&key, unix_now()).unwrap();
        (info.id, secret)
    }

    async fn generate(&self, key: &str) -> Result<EventStream, Status> {
        self.generate_some(key, Choices::default()).await
    }

    async fn generate_some(&self, key: &str, choices: Choices) -> Result<EventStream, Status> {
        self.gate.authenticate(Some(key))?;
        let caller = Caller { client: Caller::client_of(Some(key)), ..Caller::default() };
        let request = GenerateRequest {
            model: String::new(),
            prompt: Prompt::Text(String::new()),
            params: SamplingParams::default(),
            choices,
        };
        self.gate.generate(request, caller).await
    }
}

#[tokio::test]
async fn scopes() {
    let f = fixture();
    let keys = [Scope::Read, Scope::Generate, Scope::Admin].map(|s| f.key(s, KeyLimits::default()));
    let [read, generate, admin] = keys.map(|(_, secret)| secret);
    assert_eq!(f.generate(&read).await.unwrap_err().code, ErrorCode::PermissionDenied);
    assert!(f.generate(&generate).await.is_ok() && f.generate(&admin).await.is_ok());
    for key in [&read, &generate] {
        let refused = f.gate.admin(Some(key), AdminRequest::Nodes).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::PermissionDenied, "{refused}");
    }
    assert!(f.gate.admin(Some(&admin), AdminRequest::Nodes).await.is_ok());
    for key in [None, Some("mlr-wrong")] {
        let refused = f.gate.admin(key, AdminRequest::Nodes).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Unauthenticated, "{refused}");
    }
}

#[tokio::test]
async fn keys_are_made_and_revoked_from_afar() {
    let f = fixture();
    let (_, admin) = f.key(Scope::Admin, KeyLimits::default());
    let ask = async |request| f.gate.admin(Some(&admin), AdminRequest::Keys(request)).await;
    let new = NewKey::new("guest", Scope::Generate);
    let Ok(AdminReply::NewKey { info, secret }) = ask(KeyRequest::Create(new)).await else {
        panic!("no key")
    };
    assert!(f.generate(&secret).await.is_ok());
    let Ok(AdminReply::Keys(keys)) = ask(KeyRequest::List).await else { panic!("no keys") };
    assert!(keys.iter().any(|k| k.id == info.id && k.last_used.is_some()), "{keys:?}");
    assert!(ask(KeyRequest::Revoke { id: info.id.clone() }).await.is_ok());
    assert_eq!(f.generate(&secret).await.unwrap_err().code, ErrorCode::Unauthenticated);
    let again = ask(KeyRequest::Revoke { id: info.id }).await.unwrap_err();
    assert_eq!(again.code, ErrorCode::NotFound);
    let wrong = ask(KeyRequest::Create(NewKey::new("a\u{1b}b", Scope::Read))).await.unwrap_err();
    assert_eq!(wrong.code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn join_tokens_are_made_listed_and_revoked_from_afar() {
    let f = fixture();
    let (_, admin) = f.key(Scope::Admin, KeyLimits::default());
    let (_, other) = f.key(Scope::Generate, KeyLimits::default());
    let ask = async |request| f.gate.admin(Some(&admin), AdminRequest::Tokens(request)).await;
    let create = |uses, seconds| TokenRequest::Create { uses, seconds };
    let denied = f.gate.admin(Some(&other), AdminRequest::Tokens(create(1, 60))).await;
    assert_eq!(denied.unwrap_err().code, ErrorCode::PermissionDenied);

    let Ok(AdminReply::NewToken { info, token }) = ask(create(3, 60)).await else {
        panic!("no token")
    };
    let joined: JoinToken = token.parse().unwrap();
    assert_eq!((joined.addr.as_str(), joined.expires), ("h:8001", info.expires));
    let tokens = &f.gate.invitations;
    assert!(tokens.list(info.expires - 1).unwrap().contains(&info));
    let Ok(AdminReply::Tokens(all)) = ask(TokenRequest::List).await else { panic!("no list") };
    assert_eq!(all, std::slice::from_ref(&info));
    assert!(!format!("{all:?}").contains(&joined.secret_text()));

    let revoke = TokenRequest::Revoke { id: info.id };
    assert_eq!(ask(revoke.clone()).await, Ok(AdminReply::Tokens(vec![])));
    assert_eq!(ask(revoke).await.unwrap_err().code, ErrorCode::NotFound);
    for wrong in [create(0, 60), create(1001, 60), create(1, 0)] {
        assert_eq!(ask(wrong).await.unwrap_err().code, ErrorCode::InvalidArgument);
    }
    // As long as can be said, and no longer.
    let Ok(AdminReply::NewToken { info, .. }) = ask(create(1, u64::MAX)).await else {
        panic!("no token")
    };
    assert_eq!(info.expires, u64::MAX);
}

#[test]
fn texts_are_cut_into_tokens_within_the_limits() {
    let f = fixture();
    let limits =
        KeyLimits { concurrent: Some(1), requests_per_minute: Some(2), ..KeyLimits::default() };
    // Of any scope.
    let (_, key) = f.key(Scope::Read, limits);
    let caller = Caller { client: Caller::client_of(Some(&key)), ..Caller::default() };
    assert_eq!(f.gate.admit(caller.clone()).unwrap_err().code, ErrorCode::Unauthenticated);
    f.gate.authenticate(Some(&key)).unwrap();
    let pass = f.gate.admit(caller.clone()).unwrap();
    let refused = f.gate.admit(caller.clone()).unwrap_err();
    assert!(refused.message.contains("1 requests at once"), "{refused}");
    drop(pass);
    drop(f.gate.admit(caller.clone()).unwrap());
    let refused = f.gate.admit(caller).unwrap_err();
    assert!(refused.message.contains("2 requests a minute"), "{refused}");
}

#[tokio::test]
async fn requests_at_once() {
    let f = fixture();
    let limits = KeyLimits { concurrent: Some(2), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let (first, _second) = (f.generate(&key).await.unwrap(), f.generate(&key).await.unwrap());
    let third = f.generate(&key).await.unwrap_err();
    assert_eq!(third.code, ErrorCode::ResourceExhausted);
    assert!(third.retry_after_ms.is_some() && third.message.contains("at once"), "{third}");
    let (_, other) = f.key(Scope::Generate, limits);
    assert!(f.generate(&other).await.is_ok(), "each key has its own");
    drop(first);
    assert!(f.generate(&key).await.is_ok(), "the place is free again");
}

fn token() -> GenerateEvent {
    let text = String::new();
    GenerateEvent::Token { choice: 0, index: 0, token_id: 1, text, logprobs: None, calls: vec![] }
}

/// What an earlier life let in is in the account of its key, whether that was shown since or not.
#[tokio::test]
async fn requests_of_an_earlier_life_are_counted() {
    let f = fixture();
    let limits =
        KeyLimits { concurrent: Some(3), tokens_per_minute: Some(7), ..KeyLimits::default() };
    let (id, key) = f.key(Scope::Generate, limits);
    let client = Caller::client_of(Some(&key));
    let mut resumed = f.gate.accounts.resumed(client, 2);
    resumed.see(&token());
    let one = f.generate(&key).await.unwrap();
    let over = f.generate(&key).await.unwrap_err();
    assert!(over.message.contains("3 requests at once"), "{over}");
    let (_, other) = f.key(Scope::Generate, limits);
    assert!(f.generate(&other).await.is_ok(), "each key has its own");

    (0..7).for_each(|_| resumed.see(&token()));
    drop((resumed, one));
    let over = f.generate(&key).await.unwrap_err();
    assert!(over.message.contains("7 tokens a minute"), "its place is free: {over}");

    // What a revoked key began goes on, and ends; nothing of it is left.
    let mut resumed = f.gate.accounts.resumed(client, 2);
    assert!(f.gate.keys.revoke(&id).unwrap());
    assert_eq!(f.generate(&key).await.unwrap_err().code, ErrorCode::Unauthenticated);
    resumed.see(&token());
    drop(resumed);
    assert_eq!(f.gate.accounts.running(client), 0);
}

/// A request that is sent again, because a connection was lost, has its place already.
#[tokio::test]
async fn a_request_that_is_sent_again_is_not_counted_again() {
    let f = fixture();
    let limits =
        KeyLimits { concurrent: Some(1), requests_per_minute: Some(1), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let _runs = f.generate(&key).await.unwrap();
    let ask = async |id| {
        let client = Caller::client_of(Some(&key));
        let caller = Caller { client, request_id: Some(id), ..Caller::default() };
        let request = GenerateRequest {
            model: String::new(),
            prompt: Prompt::Text(String::new()),
            params: SamplingParams::default(),
            choices: Choices::default(),
        };
        f.gate.generate(request, caller).await
    };
    for _ in 0..3 {
        assert!(ask(KNOWN).await.is_ok());
    }
    let new = ask(RequestId(Uuid::from_u128(10))).await.unwrap_err();
    assert_eq!(new.code, ErrorCode::ResourceExhausted, "{new}");
}

/// Each choice has a place, those that are only compared too.
#[tokio::test]
async fn choices_at_once() {
    let f = fixture();
    let limits = KeyLimits { concurrent: Some(4), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let three = f.generate_some(&key, Choices { n: 1, best_of: 3 }).await.unwrap();
    let two = f.generate_some(&key, Choices::of(2)).await.unwrap_err();
    assert_eq!(two.code, ErrorCode::ResourceExhausted, "{two}");
    let one = f.generate(&key).await.unwrap();
    drop((one, three));
    assert!(f.generate_some(&key, Choices::of(4)).await.is_ok());
    let never = f.generate_some(&key, Choices::of(5)).await.unwrap_err();
    assert_eq!((never.code, never.param.as_deref()), (ErrorCode::InvalidArgument, Some("n")));
    let wrong = f.generate_some(&key, Choices::of(0)).await.unwrap_err();
    assert_eq!(wrong.param.as_deref(), Some("n"));
}

#[tokio::test]
async fn requests_and_tokens_a_minute() {
    let f = fixture();
    let start = Instant::now();
    let later = |seconds| start + Duration::from_secs(seconds);
    let limits = KeyLimits { requests_per_minute: Some(3), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let holder = f.gate.holder(Some(&key)).unwrap();
    for _ in 0..3 {
        drop(holder.admit(1, later(1)).unwrap());
    }
    let over = holder.admit(1, later(1)).unwrap_err();
    assert_eq!((over.code, over.retry_after_ms), (ErrorCode::ResourceExhausted, Some(20_000)));
    assert!(holder.admit(1, later(22)).is_ok());

    let limits = KeyLimits { tokens_per_minute: Some(4), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let holder = f.gate.holder(Some(&key)).unwrap();
    holder.admit(1, later(1)).unwrap().charge(3, later(1));
    // The second one owes.
    holder.admit(1, later(1)).unwrap().charge(3, later(1));
    let over = holder.admit(1, later(1)).unwrap_err();
    assert!(over.message.contains("4 tokens a minute"), "{over}");
    assert_eq!(over.retry_after_ms, Some(45_000), "two owed, and one to begin with");
    assert!(holder.admit(1, later(60)).is_ok());
}

/// What streams count: the prompt, and each token of the answer.
#[tokio::test]
async fn streams_are_counted() {
    let f = fixture();
    let limits = KeyLimits { tokens_per_minute: Some(3), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let mut stream = f.generate(&key).await.unwrap();
    while stream.next().await.is_some() {}
    let over = f.generate(&key).await.unwrap_err();
    assert_eq!(over.code, ErrorCode::ResourceExhausted, "{over}");
}

/// What embeddings count: all tokens of all texts, as soon as they are known, and one request.
#[tokio::test]
async fn embeddings_are_counted() {
    let f = fixture();
    let embed = async |key: &str| {
        f.gate.authenticate(Some(key))?;
        let caller = Caller { client: Caller::client_of(Some(key)), ..Caller::default() };
        let (model, inputs) = (String::new(), vec![Prompt::Text("a".into()); 2]);
        let request = EmbedRequest {
            model,
            inputs,
            pooling: millrace_shared::pooling::Pooling::Mean,
            dimensions: None,
        };
        f.gate.embed(request, caller).await
    };
    let (_, read) = f.key(Scope::Read, KeyLimits::default());
    assert_eq!(embed(&read).await.unwrap_err().code, ErrorCode::PermissionDenied);

    let limits = KeyLimits { tokens_per_minute: Some(6), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    // Nobody waits for the vectors, but the tokens were asked for.
    drop(embed(&key).await.unwrap());
    let over = embed(&key).await.unwrap_err();
    assert!(over.message.contains("6 tokens a minute"), "{over}");

    let limits = KeyLimits { concurrent: Some(1), ..KeyLimits::default() };
    let (_, key) = f.key(Scope::Generate, limits);
    let first = embed(&key).await.unwrap();
    assert_eq!(embed(&key).await.unwrap_err().code, ErrorCode::ResourceExhausted);
    let embedded = first.all().await.unwrap();
    assert_eq!(embedded.iter().map(|e| e.prompt_tokens).collect::<Vec<_>>(), [3, 4]);
    assert!(embed(&key).await.is_ok(), "the place is free again");
}

#[tokio::test]
async fn guessing_is_slow() {
    let f = fixture();
    let now = Instant::now();
    let (_, known) = f.key(Scope::Read, KeyLimits::default());
    let (_, unseen) = f.key(Scope::Read, KeyLimits::default());
    let (here, there) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
    let ask = |key: &str, from| f.gate.guess(Some(key), from, now);
    assert!(ask(&known, here).is_ok());
    let codes: Vec<_> = (0..60).map(|i| ask(&format!("mlr-{i}"), here).unwrap_err().code).collect();
    assert_eq!(codes[0], ErrorCode::Unauthenticated);
    assert_eq!(codes[59], ErrorCode::ResourceExhausted);
    let wait = ask("mlr-wrong", here).unwrap_err();
    assert_eq!(wait.code, ErrorCode::ResourceExhausted);
    assert!(wait.retry_after_ms.is_some());
    assert!(ask(&known, here).is_ok(), "behind one address there may be others");
    assert!(ask(&unseen, here).is_ok(), "who has a key never waits");
    let there = ask("mlr-wrong", there).unwrap_err();
    assert_eq!(there.code, ErrorCode::Unauthenticated);
    let nothing = f.gate.guess(None, here, now).unwrap_err();
    assert_eq!(nothing.code, ErrorCode::Unauthenticated, "no key is no guess");
    let later = now + Duration::from_secs(3);
    let code = f.gate.guess(Some("mlr-x"), here, later).unwrap_err().code;
    assert_eq!(code, ErrorCode::Unauthenticated);
}

#[tokio::test]
async fn nodes_are_kept_out_by_name_or_id() {
    let f = fixture();
    let (_, admin) = f.key(Scope::Admin, KeyLimits::default());
    let revoke = async |node: &str| {
        f.gate.admin(Some(&admin), AdminRequest::RevokeNode { node: node.to_owned() }).await
    };
    assert!(revoke("gpu-2").await.is_ok());
    assert!(f.gate.revoked.has(NODE));
    let absent = NodeId(Uuid::from_u128(8));
    assert!(revoke(&absent.to_string()).await.is_ok());
    assert!(f.gate.revoked.has(absent));
    assert_eq!(revoke("nobody").await.unwrap_err().code, ErrorCode::NotFound);
}
