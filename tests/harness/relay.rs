//! A UDP relay that makes a link: every datagram arrives later, or not at all.
//!
//! ```text
//! peers ──▶ front socket ──[there]──▶ target        one back socket per peer, so that the target
//! peers ◀── front socket ◀──[back]─── target        sees each of them at an address of its own
//! ```
//!
//! A thread with a tokio runtime receives; another one sleeps until the next datagram is due and
//! sends it, because tokio's timers tick in milliseconds and a sleeping thread wakes within 0.1 ms.
//! Neither looks into datagrams. What is lost, late, doubled or spoilt follows from a seed and the
//! number of the datagram in its direction. A queue that is full loses what comes, as routers do.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::oneshot;

/// Datagrams under way in both directions: far more than any test has in flight.
const QUEUE: usize = 8192;
/// Largest datagram of UDP.
const MAX_DATAGRAM: usize = 65_536;

/// One direction of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Way {
    /// From the arrival of a datagram until it is passed on.
    pub delay: Duration,
    /// Share of the datagrams that are lost, 0..1.
    pub loss: f64,
    /// Up to so much later still, each by its own: overtakes others.
    pub jitter: Duration,
    /// Share of the datagrams that arrive twice, 0..1.
    pub duplicated: f64,
    /// Share of the datagrams of which a byte is changed, 0..1.
    pub corrupted: f64,
}

impl Way {
    /// A way without loss.
    pub fn delayed(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }

    /// A way on which nothing arrives.
    pub fn cut() -> Self {
        Self { loss: 1.0, ..Self::default() }
    }
}

/// What a relay did so far, both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Datagrams passed on.
    pub passed: u64,
    /// Datagrams lost on purpose.
    pub lost: u64,
    /// Datagrams that found the queue full or no target.
    pub refused: u64,
}

/// A datagram that is due at a moment.
struct Due {
    at: Instant,
    number: u64,
    from: Arc<std::net::UdpSocket>,
    to: SocketAddr,
    bytes: Vec<u8>,
}

impl Due {
    fn key(&self) -> (Instant, u64) {
        (self.at, self.number)
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// What both threads and the owner know.
struct Shared {
    target: OnceLock<SocketAddr>,
    ways: Mutex<[Way; 2]>,
    seed: u64,
    /// Datagrams that came, by direction.
    arrived: [AtomicU64; 2],
    passed: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    closed: AtomicBool,
    line: SyncSender<Due>,
}

/// A relay in front of one address; dropping it closes the link.
pub struct Relay {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Relay {
    /// A link from peers to a target that [`Relay::set_target`] names; until then nothing passes.
    ///
    /// # Panics
    /// If there is no socket or thread to be had.
    pub fn start(there: Way, back: Way, seed: u64) -> Self {
        let front = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        let addr = front.local_addr().expect("its address");
        let (line, due) = sync_channel(QUEUE);
        let shared = Arc::new(Shared {
            target: OnceLock::new(),
            ways: Mutex::new([there, back]),
            seed,
            arrived: Default::default(),
            passed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            line,
        });
        let (stop, stopped) = oneshot::channel();
        let (receiving, sending) = (Arc::clone(&shared), Arc::clone(&shared));
        let receive = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    e = receive_front(front, &receiving) => panic!("the relay's socket: {e:?}"),
                }
            });
        };
        let threads =
            vec![std::thread::spawn(receive), std::thread::spawn(move || pass_on(&due, &sending))];
        Self { addr, shared, stop: Some(stop), threads }
    }

    /// A link of so much delay each way, without loss.
    pub fn delayed(one_way: Duration) -> Self {
        Self::start(Way::delayed(one_way), Way::delayed(one_way), 0)
    }

    /// Where peers connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Says where the link leads; only the first call counts.
    pub fn set_target(&self, target: SocketAddr) {
        let _ = self.shared.target.set(target);
    }

    /// Where the link leads.
    pub fn target(&self) -> Option<SocketAddr> {
        self.shared.target.get().copied()
    }

    /// Changes the link from now on: towards the target, and back.
    pub fn set_ways(&self, there: Way, back: Way) {
        *self.shared.ways.lock().unwrap_or_else(PoisonError::into_inner) = [there, back];
    }

    /// What it did so far.
    pub fn carried(&self) -> Carried {
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let Shared { passed, lost, refused, .. } = &*self.shared;
        Carried { passed: count(passed), lost: count(lost), refused: count(refused) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Queues a datagram that came from direction `way` (0: there, 1: back), or loses it.
    fn take(&self, way: usize, from: &Arc<std::net::UdpSocket>, to: SocketAddr, bytes: &[u8]) {
        let number = self.arrived[way].fetch_add(1, Ordering::Relaxed);
        let Way { delay, loss, jitter, duplicated, corrupted } =
            self.ways.lock().unwrap_or_else(PoisonError::into_inner)[way];
        let seed = self.seed ^ (way as u64 + 1) << 32;
        if draw(seed, number) < loss {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut bytes = bytes.to_vec();
        if draw(seed ^ 1, number) < corrupted && !bytes.is_empty() {
            let at = (draw(seed ^ 2, number) * bytes.len() as f64) as usize;
            bytes[at] ^= 0x55;
        }
        let copies = if draw(seed ^ 3, number) < duplicated { 2 } else { 1 };
        for copy in 0..copies {
            let late = jitter.mul_f64(draw(seed ^ (4 + copy), number));
            let at = Instant::now() + delay + late;
            let due = Due { at, number, from: Arc::clone(from), to, bytes: bytes.clone() };
            if self.line.try_send(due).is_err() {
                self.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// In 0..1, from a seed and a number (splitmix64).
fn draw(seed: u64, number: u64) -> f64 {
    let mut z = seed.wrapping_add((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// A socket to receive from here, and the same to send from the other thread.
fn pair(socket: std::net::UdpSocket) -> io::Result<(UdpSocket, Arc<std::net::UdpSocket>)> {
    socket.set_nonblocking(true)?;
    let sender = Arc::new(socket.try_clone()?);
    Ok((UdpSocket::from_std(socket)?, sender))
}

/// Takes what peers send; each gets a back socket and a task for the answers.
async fn receive_front(front: std::net::UdpSocket, shared: &Arc<Shared>) -> io::Error {
    let (front, answers) = match pair(front) {
        Ok(pair) => pair,
        Err(e) => return e,
    };
    let mut peers: HashMap<SocketAddr, Arc<std::net::UdpSocket>> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let (n, peer) = match front.recv_from(&mut buffer).await {
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(e) => return e,
        };
        let Some(&target) = shared.target.get() else {
            shared.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let back = match peers.get(&peer) {
            Some(back) => Arc::clone(back),
            None => {
                let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(pair);
                let (receiver, sender) = match socket {
                    Ok(pair) => pair,
                    Err(e) => return e,
                };
                let (shared, answers) = (Arc::clone(shared), Arc::clone(&answers));
                tasks.spawn(receive_back(receiver, answers, peer, shared));
                peers.insert(peer, Arc::clone(&sender));
                sender
            }
        };
        shared.take(0, &back, target, &buffer[..n]);
    }
}

/// Takes what the target answers to one peer.
async fn receive_back(
    back: UdpSocket,
    front: Arc<std::net::UdpSocket>,
    peer: SocketAddr,
    shared: Arc<Shared>,
) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        match back.recv_from(&mut buffer).await {
            Ok((n, _)) => shared.take(1, &front, peer, &buffer[..n]),
            // The target is not there (yet, or any more): peers must find that out themselves.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(_) => return,
        }
    }
}

/// The thread that sends what is due, in the order of the moments.
fn pass_on(line: &Receiver<Due>, shared: &Shared) {
    /// So often it looks whether the relay was dropped.
    const LOOK: Duration = Duration::from_millis(50);
    let mut waiting: BinaryHeap<Reverse<Due>> = BinaryHeap::new();
    loop {
        let now = Instant::now();
        while waiting.peek().is_some_and(|Reverse(due)| due.at <= now) {
            let Some(Reverse(due)) = waiting.pop() else { break };
            // A full socket buffer loses the datagram; UDP may.
            let sent = due.from.send_to(&due.bytes, due.to).is_ok();
            let count = if sent { &shared.passed } else { &shared.refused };
            count.fetch_add(1, Ordering::Relaxed);
        }
        let next = waiting.peek().map(|Reverse(due)| due.at.saturating_duration_since(now));
        match line.recv_timeout(next.unwrap_or(LOOK).min(LOOK)) {
            Ok(due) => {
                waiting.push(Reverse(due));
                // What else has come meanwhile, so that the heap decides.
                waiting.extend(line.try_iter().map(Reverse));
            }
            Err(RecvTimeoutError::Timeout) if !shared.closed.load(Ordering::Acquire) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> std::net::UdpSocket {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        socket.set_read_timeout(Some(crate::DEADLINE)).expect("a deadline");
        socket
    }

    #[test]
    fn answers_find_their_peers_and_nothing_is_early() {
        let delay = Duration::from_millis(15);
        let relay = Relay::delayed(delay);
        let (target, peers) = (echo(), [echo(), echo()]);
        relay.set_target(target.local_addr().expect("an address"));
        let mut buffer = [0; 64];
        for (i, peer) in peers.iter().enumerate() {
            let sent = Instant::now();
            peer.send_to(&[i as u8, 7], relay.addr()).expect("sent");
            let (n, from) = target.recv_from(&mut buffer).expect("passed on");
            assert!(sent.elapsed() >= delay, "early: {:?}", sent.elapsed());
            assert_eq!(buffer[..n], [i as u8, 7]);
            target.send_to(&buffer[..n], from).expect("answered");
            let (n, from) = peer.recv_from(&mut buffer).expect("the answer");
            assert!(sent.elapsed() >= 2 * delay, "early: {:?}", sent.elapsed());
            assert_eq!((&buffer[..n], from), (&[i as u8, 7][..], relay.addr()));
        }
        // A datagram is counted once it has left.
        let all = Carried { passed: 4, lost: 0, refused: 0 };
        crate::wait_for("count", || (relay.carried() == all).then_some(()));
    }

    #[test]
    fn the_same_seed_loses_the_same_datagrams_and_keeps_the_order() {
        let run = |seed| {
            let relay = Relay::start(Way { loss: 0.3, ..Way::default() }, Way::default(), seed);
            let (target, peer) = (echo(), echo());
            relay.set_target(target.local_addr().expect("an address"));
            for i in 0..200u8 {
                peer.send_to(&[i], relay.addr()).expect("sent");
                // No more at once than sockets hold.
                let seen = |c: Carried| c.passed + c.lost + c.refused == u64::from(i) + 1;
                if i % 50 == 49 {
                    crate::wait_for("datagrams", || seen(relay.carried()).then_some(()));
                }
            }
            assert_eq!(relay.carried().refused, 0);
            let mut one = [0];
            let mut next = || target.recv(&mut one).map(|_| one[0]).expect("passed on");
            (0..relay.carried().passed).map(|_| next()).collect::<Vec<u8>>()
        };
        let first = run(5);
        assert!((100..180).contains(&first.len()), "{} of 200", first.len());
        assert!(first.is_sorted(), "{first:?}");
        assert_eq!(first, run(5));
        assert_ne!(first, run(6));
    }

    #[test]
    fn datagrams_are_doubled_and_spoilt_and_overtake_each_other() {
        let jitter = Duration::from_millis(20);
        let way = Way { jitter, duplicated: 0.5, corrupted: 0.5, ..Way::default() };
        let relay = Relay::start(way, Way::default(), 3);
        let (target, peer) = (echo(), echo());
        relay.set_target(target.local_addr().expect("an address"));
        for i in 0..40u8 {
            peer.send_to(&[i, 0], relay.addr()).expect("sent");
        }
        crate::wait_for("datagrams", || (relay.carried().passed > 45).then_some(()));
        let mut two = [0; 2];
        let mut next = || target.recv(&mut two).map(|_| two).expect("passed on");
        let got: Vec<[u8; 2]> = (0..46).map(|_| next()).collect();
        assert!(!got.is_sorted(), "{got:?}");
        assert!(got.iter().any(|d| d[0] >= 40 || d[1] != 0), "{got:?}");
        assert!(got.iter().any(|d| d[0] < 40 && d[1] == 0), "{got:?}");
    }
}
