//! Processes that render chat templates, so that a template takes nothing down but its own process.
//!
//! A renderer is this same program, started with [`ARGUMENT`]: it has no environment, a bounded
//! address space, and one socket, over which it gets the template, then conversations, and gives
//! prompts back. One that dies (too much memory, too deep a nesting) or is late is a refused
//! request; the next one starts another. Renderers end when their socket closes, however the
//! program does. At most `MOST` render at a time; the others wait for one.
//!
//! On the socket: lengths (4 bytes, little-endian) and that much; an answer begins with a byte, 0
//! for a prompt and 1 for what is wrong.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rlimit::Resource;
use serde::{Deserialize, Serialize};

use super::TextError;
use super::template::{MAX_OUTPUT, Template};
use super::tools::Turns;

/// The first and only argument of a program that is to render.
pub const ARGUMENT: &str = "render-chat-templates";
/// Address space of a renderer beyond what the program itself, with its libraries, has taken.
const MEMORY_BYTES: u64 = 768 << 20;
/// Renderers at a time.
const MOST: usize = 3;
/// Longer than the interpreter's own bound of instructions takes, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest message to a renderer.
const MAX_REQUEST: usize = 256 << 20;

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// From now on templates of this process are rendered by others. For the `main` of a program that
/// calls [`serve_if_asked`] first.
pub fn enable() {
    // Also where the file was replaced or removed meanwhile.
    enable_as(PathBuf::from("/proc/self/exe"));
}

/// [`enable`] for a program that cannot render: `program` does it.
pub fn enable_as(program: PathBuf) {
    // The first one stays.
    let _ = PROGRAM.set(program);
}

pub(super) fn program() -> Option<&'static Path> {
    PROGRAM.get().map(PathBuf::as_path)
}

/// Renders until nobody asks any more, where that is what this process was started for: says
/// whether it was.
pub fn serve_if_asked() -> bool {
    let mut arguments = std::env::args_os().skip(1);
    let asked = arguments.next().as_deref() == Some(OsStr::new(ARGUMENT));
    // Whatever ends it, there is nobody to tell but who reads the socket.
    if asked && arguments.next().is_none() {
        let _ = serve();
        return true;
    }
    false
}

/// What a renderer gets first.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Source {
    pub(super) source: String,
    pub(super) bos: String,
    pub(super) eos: String,
}

#[derive(Serialize, Deserialize)]
struct Asked {
    #[serde(flatten)]
    turns: Turns,
    add_generation_prompt: bool,
}

/// Address space of this process.
fn own_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = size.and_then(|size| size.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("no VmSize in /proc/self/status"))
}

fn serve() -> io::Result<()> {
    let most = own_bytes()? + MEMORY_BYTES;
    Resource::AS.set(most, most)?;
    Resource::CORE.set(0, 0)?;
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let source: Source = serde_json::from_slice(&receive(&mut socket, MAX_REQUEST)?)?;
    let template = match Template::new(&source.source, source.bos, source.eos) {
        Ok(template) => template,
        Err(e) => return answer(&mut socket, Err(told(e))),
    };
    answer(&mut socket, Ok(String::new()))?;
    loop {
        let asked: Asked = serde_json::from_slice(&receive(&mut socket, MAX_REQUEST)?)?;
        let rendered =
            template.render(&asked.turns.messages, &asked.turns.tools, asked.add_generation_prompt);
        answer(&mut socket, rendered.map_err(told))?;
    }
}

/// What an error says, without what its kind says: the reader adds that.
fn told(error: TextError) -> String {
    match error {
        TextError::Template(message) | TextError::Render(message) => message,
        other => other.to_string(),
    }
}

fn answer(socket: &mut impl Write, result: Result<String, String>) -> io::Result<()> {
    let (kind, text) = match result {
        Ok(text) => (0, text),
        Err(text) => (1, text),
    };
    send(socket, &[&[kind], text.as_bytes()].concat())
}

fn send(socket: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    socket.write_all(&length.to_le_bytes())?;
    socket.write_all(bytes)
}

fn receive(socket: &mut impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > limit {
        return Err(io::Error::other(format!("{length} bytes, at most {limit}")));
    }
    // Memory is taken as the bytes come.
    let mut bytes = Vec::new();
    socket.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

/// A socket whose every wait ends at the same moment.
struct Timed<'a> {
    socket: &'a UnixStream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// A wait that ended without a byte says `WouldBlock`.
fn late(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer).map_err(late)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(buffer).map_err(late)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The renderers of one template.
#[derive(Debug)]
pub(super) struct Renderers {
    program: PathBuf,
    source: Vec<u8>,
    state: Mutex<State>,
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Renderer>,
    busy: usize,
}

impl Renderers {
    /// Starts the first one, which compiles the template.
    pub(super) fn start(program: &Path, source: Source) -> Result<Self, TextError> {
        let broken = |e: io::Error| TextError::Template(e.to_string());
        let source = serde_json::to_vec(&source).map_err(|e| broken(e.into()))?;
        let first = Renderer::start(program, &source).map_err(broken)?;
        let first = first.map_err(TextError::Template)?;
        let state = Mutex::new(State { idle: vec![first], busy: 0 });
        Ok(Self { program: program.to_owned(), source, state, given_back: Condvar::new() })
    }

    /// As [`super::ChatTemplate::render`].
    pub(super) fn render(
        &self,
        turns: Turns,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let asked = Asked { turns, add_generation_prompt };
        let asked = serde_json::to_vec(&asked).map_err(|e| TextError::Render(e.to_string()))?;
        let idle = self.take()?;
        let (result, kept) = self.ask(idle, &asked);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.busy -= 1;
        state.idle.extend(kept);
        drop(state);
        self.given_back.notify_one();
        result
    }

    /// An idle one, or leave to start one; counts as busy.
    fn take(&self) -> Result<Option<Renderer>, TextError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited =
            self.given_back.wait_timeout_while(state, DEADLINE, |state| state.busy >= MOST);
        let (mut state, late) = waited.unwrap_or_else(PoisonError::into_inner);
        if late.timed_out() {
            let message = "other conversations take too long to render; try again later";
            return Err(TextError::Render(message.to_owned()));
        }
        state.busy += 1;
        Ok(state.idle.pop())
    }

    /// What came of it, and the renderer if it can be asked again.
    fn ask(
        &self,
        idle: Option<Renderer>,
        asked: &[u8],
    ) -> (Result<String, TextError>, Option<Renderer>) {
        let failed = |message: String| (Err(TextError::Render(message)), None);
        let renderer = match idle {
            Some(renderer) => Ok(Ok(renderer)),
            None => Renderer::start(&self.program, &self.source),
        };
        let mut renderer = match renderer {
            Ok(Ok(renderer)) => renderer,
            Ok(Err(message)) => return failed(message),
            Err(e) => return failed(format!("its process does not start: {e}")),
        };
        match renderer.ask(asked) {
            Ok(answer) => (answer.map_err(TextError::Render), Some(renderer)),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => failed("it runs for too long".into()),
            Err(_) => failed("it takes too much memory, or breaks its interpreter".into()),
        }
    }
}

/// One process; killed when dropped.
#[derive(Debug)]
struct Renderer {
    child: Child,
    socket: UnixStream,
}

impl Renderer {
    /// Starts one; the inner error is the template's.
    fn start(program: &Path, source: &[u8]) -> io::Result<Result<Self, String>> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new(program)
            .arg0("millrace: chat templates")
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            // Ctrl-C in a terminal is for the program, which goes on rendering while it drains.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut renderer = Self { child, socket };
        Ok(renderer.ask(source)?.map(|_| renderer))
    }

    fn ask(&mut self, bytes: &[u8]) -> io::Result<Result<String, String>> {
        let until = Instant::now() + DEADLINE;
        let mut timed = Timed { socket: &self.socket, until };
        send(&mut timed, bytes)?;
        let answer = receive(&mut timed, MAX_OUTPUT + 1)?;
        let (kind, text) = answer.split_first().ok_or(io::ErrorKind::UnexpectedEof)?;
        let text = String::from_utf8(text.to_vec()).map_err(io::Error::other)?;
        Ok(if *kind == 0 { Ok(text) } else { Err(text) })
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_a_longest_length_and_an_end() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        send(&mut here, b"abc").unwrap();
        assert_eq!(receive(&mut there, 3).unwrap(), b"abc");
        send(&mut here, b"abcd").unwrap();
        assert!(receive(&mut there, 3).is_err());
        let (mut here, mut there) = UnixStream::pair().unwrap();
        here.write_all(&[9, 0, 0, 0, 1]).unwrap();
        drop(here);
        let error = receive(&mut there, 100).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
