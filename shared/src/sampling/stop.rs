//! Stop strings over text that grows piece by piece.
//!
//! Text that may be the beginning of a stop string is held back until it is certain that it is
//! not, so no part of a stop string is ever emitted. What is emitted does not depend on how the
//! text was cut into pieces. Where several stop strings match, the one that *begins* first wins.

/// What became certain with a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text to pass on; may be empty.
    pub emit: String,
    /// Whether a stop string was found. What follows it is dropped, and so is all later text.
    pub stopped: bool,
}

/// Finds stop strings in text as it grows.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text and returns what is certain not to belong to a stop string.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome { emit: String::new(), stopped: true };
        }
        if self.stops.is_empty() {
            return StopOutcome { emit: text.to_owned(), stopped: false };
        }
        self.held.push_str(text);
        let open = self.first_open();
        match self.first_match() {
            // An earlier beginning may still become a match that wins.
            Some(at) if at <= open => {
                self.stopped = true;
                let mut emit = std::mem::take(&mut self.held);
                emit.truncate(at);
                StopOutcome { emit, stopped: true }
            }
            _ => {
                let rest = self.held.split_off(open);
                let emit = std::mem::replace(&mut self.held, rest);
                StopOutcome { emit, stopped: false }
            }
        }
    }

    /// The text ended: returns what was held back, without a stop string that it completes.
    pub fn finish(&mut self) -> String {
        let at = self.first_match();
        let mut rest = std::mem::take(&mut self.held);
        if let Some(at) = at {
            self.stopped = true;
            rest.truncate(at);
        }
        rest
    }

    /// [`StopMatcher::push`] and [`StopMatcher::finish`] in one, for the last piece of a text. A stop
    /// string that had to wait for a longer one is found only now.
    pub fn end(&mut self, text: &str) -> StopOutcome {
        let mut emit = self.push(text).emit;
        emit.push_str(&self.finish());
        StopOutcome { emit, stopped: self.stopped }
    }

    /// Whether a stop string was found, by [`StopMatcher::finish`] too.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Byte offset of the stop string that begins first in the held text.
    fn first_match(&self) -> Option<usize> {
        self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min()
    }

    /// Byte offset of the first suffix of the held text that is a proper beginning of a stop
    /// string; its length if there is none. Always on a character boundary.
    fn first_open(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = self.held.len().saturating_sub(longest.saturating_sub(1));
        (earliest..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| {
                let tail = &self.held[at..];
                self.stops.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
            })
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn holds_back_what_may_become_a_stop_string() {
        let mut m = matcher(&["\n\nUser:"]);
        assert_eq!(m.push("Hi\n"), StopOutcome { emit: "Hi".into(), stopped: false });
        assert_eq!(m.push("\nUs"), StopOutcome::default());
        assert_eq!(m.push("e"), StopOutcome::default());
        assert_eq!(m.push("less"), StopOutcome { emit: "\n\nUseless".into(), stopped: false });
        assert_eq!(m.push("\n\nUser: x"), StopOutcome { emit: String::new(), stopped: true });
        assert_eq!(m.push("more"), StopOutcome { emit: String::new(), stopped: true });
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn finish_gives_back_the_rest() {
        let mut m = matcher(&["END"]);
        assert_eq!(m.push("the EN").emit, "the ");
        assert_eq!(m.finish(), "EN");
        assert!(!m.stopped());
    }

    /// A short stop inside a longer one that began earlier has to wait for the longer one.
    #[test]
    fn the_earliest_beginning_wins() {
        let mut m = matcher(&["abcd", "bc"]);
        assert_eq!(m.push("xabc"), StopOutcome { emit: "x".into(), stopped: false });
        assert_eq!(m.push("d"), StopOutcome { emit: String::new(), stopped: true });
        let mut m = matcher(&["abcd", "bc"]);
        m.push("xabc");
        assert_eq!(m.push("e"), StopOutcome { emit: "a".into(), stopped: true });
        let mut m = matcher(&["abcd", "bc"]);
        m.push("xabc");
        assert_eq!(m.finish(), "a");
        assert!(m.stopped());
        let mut m = matcher(&["abcd", "bc"]);
        m.push("xab");
        assert_eq!(m.end("c"), StopOutcome { emit: "a".into(), stopped: true });
        let mut m = matcher(&["abcd", "bc"]);
        m.push("xa");
        assert_eq!(m.end("b"), StopOutcome { emit: "ab".into(), stopped: false });
    }

    #[test]
    fn characters_stay_whole() {
        let mut m = matcher(&["é!"]);
        assert_eq!(m.push("caf"), StopOutcome { emit: "caf".into(), stopped: false });
        assert_eq!(m.push("é").emit, "");
        assert_eq!(m.push("s").emit, "és");
    }
}
