//! Patterns as one: where the first match is, and how much text is certain to hold no other.
//!
//! Matching is `regex-automata`'s, the engine of the crate `regex`: linear time, patterns bounded by
//! [`MAX_PATTERN_BYTES`] and by the size of what they compile to. The leftmost match counts, of
//! several that begin there that of the first pattern. For text that grows there is a second
//! automaton, without look-around, that tells whether any match that begins at a place can still go
//! on: it may say so too often, by a byte, but never too seldom.

use std::fmt;

use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::pool::Pool;
use regex_automata::{Anchored, Input, MatchKind, meta};
use regex_syntax::hir::{Capture, Hir, HirKind, Repetition};

/// Most patterns of a list.
const MAX_PATTERNS: usize = 64;
/// Longest pattern.
const MAX_PATTERN_BYTES: usize = 1024;
/// Longest match in an answer, bytes: what is held back at most.
pub(super) const MAX_MATCH_BYTES: usize = 1024;
/// What all patterns together may compile to, as in the crate `regex`.
const MAX_COMPILED_BYTES: usize = 10 << 20;

/// A match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Byte at which it begins.
    pub(super) start: usize,
    /// One past its last byte.
    pub(super) end: usize,
    /// Whether it blocks, rather than being redacted.
    pub(super) blocks: bool,
}

type MakeCache =
    Box<dyn Fn() -> Cache + Send + Sync + std::panic::UnwindSafe + std::panic::RefUnwindSafe>;

/// Tells whether a match can go on.
struct Alive {
    dfa: DFA,
    caches: Pool<Cache, MakeCache>,
}

/// See the module's documentation.
pub(super) struct Patterns {
    regex: meta::Regex,
    /// For text that grows.
    alive: Option<Alive>,
    /// Patterns before this one block.
    blocks: usize,
}

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patterns")
            .field("patterns", &self.regex.pattern_len())
            .finish_non_exhaustive()
    }
}

impl Patterns {
    /// Of these patterns; `None` where there are none. With `grows`, for text that grows.
    ///
    /// # Errors
    /// What is wrong, and with which.
    pub(super) fn new(
        block: &[String],
        redact: &[String],
        grows: bool,
    ) -> Result<Option<Self>, String> {
        let all: Vec<&String> = block.iter().chain(redact).collect();
        if all.is_empty() {
            return Ok(None);
        }
        if all.len() > MAX_PATTERNS {
            return Err(format!("{} patterns, at most {MAX_PATTERNS}", all.len()));
        }
        let parsed = all.iter().map(|p| parse(p, grows)).collect::<Result<Vec<_>, _>>()?;
        let large = |e: String| {
            format!("the patterns compile to more than {} MiB ({e})", MAX_COMPILED_BYTES >> 20)
        };
        let config = meta::Config::new()
            .nfa_size_limit(Some(MAX_COMPILED_BYTES))
            .match_kind(MatchKind::LeftmostFirst);
        let regex = meta::Builder::new()
            .configure(config)
            .build_many_from_hir(&parsed)
            .map_err(|e| large(e.to_string()))?;
        let alive = match grows {
            true => Some(Alive::new(&parsed).map_err(large)?),
            false => None,
        };
        Ok(Some(Self { regex, alive, blocks: block.len() }))
    }

    /// The first match in `text` from byte `from` on, as if nothing followed the text.
    pub(super) fn find(&self, text: &str, from: usize) -> Option<Found> {
        let found = self.regex.find(Input::new(text).range(from..))?;
        let blocks = found.pattern().as_usize() < self.blocks;
        Some(Found { start: found.start(), end: found.end(), blocks })
    }

    /// The first place of `text` from byte `from` on where a match may begin that goes on behind it;
    /// its length if there is none. What begins before that place does not depend on what follows.
    pub(super) fn open(&self, text: &str, from: usize) -> usize {
        let Some(alive) = &self.alive else { return text.len() };
        let mut cache = alive.caches.get();
        let places = (from..text.len()).filter(|&at| text.is_char_boundary(at));
        let mut open = places.filter(|&at| alive.goes_on(&mut cache, &text.as_bytes()[at..]));
        open.next().unwrap_or(text.len())
    }
}

impl Alive {
    fn new(patterns: &[Hir]) -> Result<Self, String> {
        let bare: Vec<Hir> = patterns.iter().map(without_looks).collect();
        let config = thompson::Config::new()
            .nfa_size_limit(Some(MAX_COMPILED_BYTES))
            .which_captures(WhichCaptures::None);
        let nfa = thompson::Compiler::new().configure(config).build_many_from_hir(&bare);
        let nfa = nfa.map_err(|e| e.to_string())?;
        let config = DFA::config().match_kind(MatchKind::All).skip_cache_capacity_check(true);
        let dfa =
            DFA::builder().configure(config).build_from_nfa(nfa).map_err(|e| e.to_string())?;
        let of = dfa.clone();
        let make: MakeCache = Box::new(move || of.create_cache());
        Ok(Self { dfa, caches: Pool::new(make) })
    }

    /// Whether a match that begins where `text` does may go on behind it.
    fn goes_on(&self, cache: &mut Cache, text: &[u8]) -> bool {
        // No match is longer; a character more is what look-around sees.
        if text.len() > MAX_MATCH_BYTES + 4 {
            return false;
        }
        let input = Input::new(text).anchored(Anchored::Yes);
        // An automaton that gives up cannot tell.
        let Ok(mut state) = self.dfa.start_state_forward(cache, &input) else { return true };
        for &byte in text {
            match self.dfa.next_state(cache, state, byte) {
                Ok(next) if next.is_dead() => return false,
                Ok(next) => state = next,
                Err(_) => return true,
            }
        }
        if !state.is_match() {
            return true;
        }
        // Matches are told of a byte late: this one may be over.
        let clears = cache.clear_count();
        let classes = self.dfa.byte_classes().representatives(0u8..);
        for byte in classes.filter_map(|unit| unit.as_u8()) {
            let next = self.dfa.next_state(cache, state, byte);
            // States have other names after a clearing.
            if cache.clear_count() != clears || !next.is_ok_and(|next| next.is_dead()) {
                return true;
            }
        }
        false
    }
}

fn parse(pattern: &str, grows: bool) -> Result<Hir, String> {
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(format!("a pattern of {} bytes, at most {MAX_PATTERN_BYTES}", pattern.len()));
    }
    let hir =
        regex_syntax::parse(pattern).map_err(|e| format!("'{pattern}' is no pattern:\n{e}"))?;
    let properties = hir.properties();
    match (properties.minimum_len(), properties.maximum_len()) {
        (None | Some(0), _) => Err(format!(
            "'{pattern}' matches the empty text (or nothing at all): say what is to be there"
        )),
        (_, longest) if grows && longest.is_none_or(|n| n > MAX_MATCH_BYTES) => Err(format!(
            "'{pattern}' can match {}; in an answer, which is sent while it grows, a match may have \
             {MAX_MATCH_BYTES} bytes (a letter of any script has up to 4): bound it, as in {{1,100}} \
             instead of +, or [a-z] instead of \\w",
            longest.map_or_else(|| "texts of any length".into(), |n| format!("texts of {n} bytes")),
        )),
        _ => Ok(hir),
    }
}

/// The same pattern, which holds wherever it stands: it matches at least what the other one does.
fn without_looks(hir: &Hir) -> Hir {
    match hir.kind() {
        HirKind::Look(_) => Hir::empty(),
        HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) => hir.clone(),
        HirKind::Repetition(of) => {
            let sub = Box::new(without_looks(&of.sub));
            Hir::repetition(Repetition { sub, ..of.clone() })
        }
        HirKind::Capture(of) => {
            let sub = Box::new(without_looks(&of.sub));
            Hir::capture(Capture { sub, ..of.clone() })
        }
        HirKind::Concat(all) => Hir::concat(all.iter().map(without_looks).collect()),
        HirKind::Alternation(all) => Hir::alternation(all.iter().map(without_looks).collect()),
    }
}
