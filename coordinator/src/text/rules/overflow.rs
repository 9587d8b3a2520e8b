//! Prompts that are too long: refused, or shortened.
//!
//! Plain prompts are cut by tokens. Of a conversation no markup is cut: its last message is, or its
//! oldest turns go (a message of the user with all that follows it up to the next); system messages
//! stay. What cannot be shortened enough is refused.

use std::str::FromStr;

use millrace_shared::error::Status;
use millrace_shared::wire::rpc::{ChatMessage, Conversation};

/// Times that a message is cut anew where it was not cut enough.
const TRIES: usize = 8;

/// What is done to a prompt that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// An error says so.
    #[default]
    Refuse,
    /// The beginning goes.
    KeepEnd,
    /// The end goes.
    KeepBeginning,
    /// The oldest turns of a conversation go.
    DropTurns,
}

impl FromStr for Overflow {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "refuse" => Ok(Self::Refuse),
            "keep-end" => Ok(Self::KeepEnd),
            "keep-beginning" => Ok(Self::KeepBeginning),
            "drop-turns" => Ok(Self::DropTurns),
            _ => Err(format!(
                "unknown way '{s}': use refuse, keep-end, keep-beginning or drop-turns"
            )),
        }
    }
}

/// A prompt that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fitted {
    /// Its ids.
    pub(crate) ids: Vec<u32>,
    /// Tokens that it had more.
    pub(crate) left_out: u32,
}

/// A prompt that may be too long.
#[derive(Debug)]
pub(crate) struct Overlong {
    /// Its ids.
    pub(crate) ids: Vec<u32>,
    /// Most tokens.
    pub(crate) limit: usize,
}

impl Overlong {
    fn refused(&self, param: &str, what: &str) -> Status {
        let Self { ids, limit } = self;
        Status::invalid(
            param,
            format!("has {} tokens, at most {limit} are taken here{what}; shorten it", ids.len()),
        )
    }

    fn fitted(&self, ids: Vec<u32>) -> Fitted {
        let left_out = self.ids.len().saturating_sub(ids.len());
        Fitted { ids, left_out: left_out as u32 }
    }

    /// A plain prompt that fits; `begins` is the token that texts begin with, which stays.
    ///
    /// # Errors
    /// If it is too long and must not be cut.
    pub(crate) fn plain(self, how: Overflow, begins: Option<u32>) -> Result<Fitted, Status> {
        if self.ids.len() <= self.limit {
            return Ok(Fitted { ids: self.ids, left_out: 0 });
        }
        match how {
            Overflow::Refuse => Err(self.refused("prompt", "")),
            Overflow::DropTurns => {
                Err(self.refused("prompt", ", and there are no turns to leave out"))
            }
            Overflow::KeepBeginning => Ok(self.fitted(self.ids[..self.limit].to_vec())),
            Overflow::KeepEnd => {
                let first = self.ids.first().copied().filter(|first| Some(*first) == begins);
                let rest = self.limit - usize::from(first.is_some());
                let end = &self.ids[self.ids.len() - rest..];
                Ok(self.fitted(first.iter().chain(end).copied().collect()))
            }
        }
    }

    /// A conversation that fits; `ids_of` renders and tokenises one.
    ///
    /// # Errors
    /// If it is too long and cannot be shortened enough, or cannot be rendered.
    pub(crate) fn chat(
        self,
        how: Overflow,
        conversation: &Conversation,
        ids_of: impl Fn(&Conversation) -> Result<Vec<u32>, Status>,
    ) -> Result<Fitted, Status> {
        if self.ids.len() <= self.limit {
            return Ok(Fitted { ids: self.ids, left_out: 0 });
        }
        match how {
            Overflow::Refuse => Err(self.refused("messages", "")),
            Overflow::KeepEnd | Overflow::KeepBeginning => self.cut(how, conversation, ids_of),
            Overflow::DropTurns => self.without_turns(conversation, ids_of),
        }
    }

    /// Without as many of the oldest turns as it takes.
    fn without_turns(
        self,
        conversation: &Conversation,
        ids_of: impl Fn(&Conversation) -> Result<Vec<u32>, Status>,
    ) -> Result<Fitted, Status> {
        let turns = turns(&conversation.messages);
        let (mut few, mut enough) = (0, turns);
        let mut found = None;
        // Without `few` turns it is too long; with `enough` fewer it fits, or nothing does.
        while few + 1 < enough {
            let middle = few.midpoint(enough);
            let ids = ids_of(&without(conversation, middle))?;
            if ids.len() <= self.limit {
                (enough, found) = (middle, Some(ids));
            } else {
                few = middle;
            }
        }
        match found {
            Some(ids) => Ok(self.fitted(ids)),
            None => Err(self.refused("messages", ", even without all turns but the last")),
        }
    }

    /// With less of the last message.
    fn cut(
        self,
        how: Overflow,
        conversation: &Conversation,
        ids_of: impl Fn(&Conversation) -> Result<Vec<u32>, Status>,
    ) -> Result<Fitted, Status> {
        let too_long = || self.refused("messages", ", even without its last message");
        let Some(last) = conversation.messages.last() else { return Err(too_long()) };
        let mut shorter = conversation.clone();
        let mut kept: Vec<char> = last.content.chars().collect();
        let set = |shorter: &mut Conversation, kept: &[char]| {
            if let Some(message) = shorter.messages.last_mut() {
                message.content = kept.iter().collect();
            }
        };
        set(&mut shorter, &[]);
        let around = ids_of(&shorter)?.len();
        let Some(room) = self.limit.checked_sub(around).filter(|room| *room > 0) else {
            return Err(too_long());
        };
        let mut tokens = self.ids.len() - around.min(self.ids.len());
        for _ in 0..TRIES {
            // In proportion, and a character less where that changes nothing.
            let more = kept.len() * room / tokens.max(1);
            let count = more.min(kept.len().saturating_sub(1));
            match how {
                Overflow::KeepEnd => drop(kept.drain(..kept.len() - count)),
                _ => kept.truncate(count),
            }
            set(&mut shorter, &kept);
            let ids = ids_of(&shorter)?;
            if ids.len() <= self.limit {
                return Ok(self.fitted(ids));
            }
            tokens = ids.len() - around.min(ids.len());
        }
        Err(too_long())
    }
}

/// Where turns begin, the messages before the first one's being no turn where they are the system's.
fn begins_turn(messages: &[ChatMessage], at: usize) -> bool {
    let first = || messages[..at].iter().all(|m| m.role == "system");
    messages[at].role != "system" && (messages[at].role == "user" || first())
}

/// Turns of a conversation.
fn turns(messages: &[ChatMessage]) -> usize {
    (0..messages.len()).filter(|&at| begins_turn(messages, at)).count()
}

/// A conversation without so many of its oldest turns.
fn without(conversation: &Conversation, turns: usize) -> Conversation {
    let all = &conversation.messages;
    let mut turn = 0;
    let mut messages = Vec::new();
    for (at, message) in all.iter().enumerate() {
        turn += usize::from(begins_turn(all, at));
        if message.role == "system" || turn > turns {
            messages.push(message.clone());
        }
    }
    Conversation { messages, ..conversation.clone() }
}
