//! The same bytes without encryption, frames or credits: what the kernel alone costs.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use crate::{FRAMES, WINDOW, ping_pong};

/// A datagram on an ordinary network.
const DATAGRAM: usize = 1452;
/// Largest frame that the buffer of a socket takes at once, as systems come (212,992 bytes, of which
/// the kernel counts about half for itself).
pub(crate) const UDP_FRAME: usize = 64 << 10;
/// A lost datagram ends a measurement, it does not hang it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sorted round trips, and bytes per second one way, with an answer of one byte per window.
pub(crate) fn tcp(bytes: usize) -> (Vec<Duration>, f64) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let far = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut buffer = vec![0; bytes];
        // The first byte says how much comes back: all of it, one byte, nothing.
        while stream.read_exact(&mut buffer).is_ok() {
            let answer = match buffer[0] {
                0 => 0,
                1 => 1,
                _ => bytes,
            };
            stream.write_all(&buffer[..answer]).unwrap();
        }
    });
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut frame = vec![2; bytes];
    let mut back = vec![0; bytes];
    let times = ping_pong(|| {
        stream.write_all(&frame).unwrap();
        stream.read_exact(&mut back).unwrap();
    });
    let start = Instant::now();
    for i in 1..=FRAMES {
        frame[0] = u8::from(i % WINDOW as usize == 0 || i == FRAMES);
        stream.write_all(&frame).unwrap();
        if frame[0] == 1 {
            stream.read_exact(&mut back[..1]).unwrap();
        }
    }
    let rate = (bytes * FRAMES) as f64 / start.elapsed().as_secs_f64();
    drop(stream);
    far.join().unwrap();
    (times, rate)
}

/// As [`tcp`], in datagrams of an ordinary network's size.
pub(crate) fn udp(bytes: usize) -> (Vec<Duration>, f64) {
    let bind = || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let (near, far) = (bind(), bind());
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    let take = move |socket: &UdpSocket, bytes: usize| -> Option<u8> {
        let (mut got, mut first, mut buffer) = (0, None, [0; DATAGRAM]);
        while got < bytes {
            got += socket.recv(&mut buffer).ok()?;
            first.get_or_insert(buffer[0]);
        }
        first
    };
    let give = |socket: &UdpSocket, frame: &[u8]| {
        for piece in frame.chunks(DATAGRAM) {
            socket.send(piece).unwrap();
        }
    };
    let echo = thread::spawn(move || {
        let frame = vec![2; bytes];
        // Its first byte says what comes back: nothing, a byte, all of it; else it was the last.
        while let Some(kind) = take(&far, bytes) {
            match kind {
                0 => {}
                1 => give(&far, &frame[..1]),
                2 => give(&far, &frame),
                _ => return,
            }
        }
    });
    let mut frame = vec![2; bytes];
    let times = ping_pong(|| {
        give(&near, &frame);
        take(&near, bytes).expect("no datagram is lost on loopback");
    });
    let start = Instant::now();
    for _ in 0..FRAMES {
        // Nothing holds the sender back, so each frame waits for the one before it.
        frame.fill(1);
        give(&near, &frame);
        take(&near, 1).expect("no datagram is lost on loopback");
    }
    let rate = (bytes * FRAMES) as f64 / start.elapsed().as_secs_f64();
    frame.fill(3);
    give(&near, &frame);
    echo.join().unwrap();
    (times, rate)
}
