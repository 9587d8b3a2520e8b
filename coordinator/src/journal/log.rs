//! The tokens of a choice so far, in order.
//!
//! It only grows, and whoever wants to read it while it does takes a copy, which shares all but the
//! last few tokens: attaching to a long answer costs its producer next to nothing.

use std::sync::Arc;

use super::record::Token;

/// Tokens that are shared as one.
const SEGMENT: usize = 256;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Log {
    sealed: Vec<Arc<[Token]>>,
    /// Fewer than [`SEGMENT`].
    tail: Vec<Token>,
}

impl Log {
    /// How many.
    pub fn len(&self) -> usize {
        self.sealed.len() * SEGMENT + self.tail.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.tail.is_empty()
    }

    /// One more.
    pub fn push(&mut self, token: Token) {
        self.tail.push(token);
        if self.tail.len() == SEGMENT {
            self.sealed.push(std::mem::take(&mut self.tail).into());
        }
    }

    /// The token of this index.
    pub fn get(&self, index: usize) -> Option<&Token> {
        match self.sealed.get(index / SEGMENT) {
            Some(segment) => segment.get(index % SEGMENT),
            None => self.tail.get(index - self.sealed.len() * SEGMENT),
        }
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Token> {
        self.sealed.iter().flat_map(|segment| segment.iter()).chain(&self.tail)
    }
}

impl PartialEq for Log {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_its_place() {
        let token = |id| Token { id, at_ms: 0, logprobs: None };
        let mut log = Log::default();
        assert!(log.is_empty() && log.get(0).is_none());
        for id in 0..1000 {
            let before = log.clone();
            log.push(token(id));
            assert_eq!((before.len(), log.len()), (id as usize, id as usize + 1));
            assert_eq!(log.get(id as usize).map(|t| t.id), Some(id));
            assert!(before.get(id as usize).is_none(), "a copy does not grow");
        }
        assert!(log.iter().map(|t| t.id).eq(0..1000));
        assert!(log.get(1000).is_none() && log.get(5000).is_none());
    }
}
