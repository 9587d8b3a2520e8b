//! Bytes that nobody meant: everything that reads what others send or store, fed with sound inputs
//! that were damaged by a seeded mutator.
//!
//! A target is a function that must not panic, hang or take much memory, whatever the bytes are, and
//! a corpus of sound inputs from which the damage begins: single bytes and numbers, pieces doubled,
//! moved or taken from another input, words that the reader knows. What covers the rest (checksums,
//! lengths in front) is mended after most of the damage, for else nothing deeper would be reached.
//! Inputs that a target accepts are kept and damaged further, so that long runs go deeper. The test runs a bounded number of inputs; the long
//! run is `cargo bench --bench fuzz -- --seconds 3600`.

mod corpus;
mod memory;
mod scheduler;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use memory::Counting;
pub use targets::{Http, targets};

use crate::chaos::Dice;

/// Reads bytes; whether they were accepted.
pub type Read = Box<dyn Fn(&[u8]) -> bool>;

/// Something that reads bytes.
pub struct Target {
    /// For tables.
    pub name: &'static str,
    /// Sound inputs.
    pub corpus: Vec<Vec<u8>>,
    /// Reads; whether the bytes were accepted.
    pub read: Read,
    /// What its texts are made of.
    pub words: &'static [&'static str],
    /// Makes what covers the rest right again.
    pub mend: Option<fn(&mut Vec<u8>)>,
    /// Most bytes of memory that reading may take: so many, and so many for each of the input's.
    /// Judged where [`Counting`] is the allocator.
    pub memory: (usize, usize),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Inputs that were read.
    pub inputs: u64,
    /// Those that were accepted.
    pub accepted: u64,
}

/// Most inputs that are kept beside the corpus.
const KEPT: usize = 512;
/// Longer ones are cut: damage matters, not size.
const LONGEST: usize = 16 << 10;

/// A run over one target, to be gone on with.
#[derive(Debug)]
pub struct Run<'a> {
    target: &'a Target,
    dice: Dice,
    kept: Vec<Vec<u8>>,
    /// So far.
    pub counts: Counts,
}

impl<'a> Run<'a> {
    /// Reads the corpus, which must be accepted.
    ///
    /// # Panics
    /// If an input of the corpus is refused, for then it is none, or breaks the target.
    pub fn start(target: &'a Target, seed: u64) -> Self {
        // The backtrace of a panic that is caught would count as the target's memory.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
        let mut run =
            Self { target, dice: Dice::new(seed), kept: Vec::new(), counts: Counts::default() };
        for (i, bytes) in target.corpus.iter().enumerate() {
            assert!(run.read(bytes), "{}: input {i} of the corpus is refused", target.name);
        }
        run
    }

    /// Reads so many damaged inputs.
    ///
    /// # Panics
    /// If one breaks the target; the message holds the input.
    pub fn go_on(&mut self, inputs: u64) {
        for _ in 0..inputs {
            let bytes = self.damaged();
            if self.read(&bytes) && self.kept.len() < KEPT && !self.kept.contains(&bytes) {
                self.kept.push(bytes);
            }
        }
    }

    fn read(&mut self, bytes: &[u8]) -> bool {
        let read = || catch_unwind(AssertUnwindSafe(|| (self.target.read)(bytes)));
        let (read, peak) = memory::peak_of(read);
        let broken = |how: String| -> ! {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            panic!("{} {how} {} bytes: {hex}", self.target.name, bytes.len());
        };
        let Ok(accepted) = read else { broken("breaks on".into()) };
        let (some, each) = self.target.memory;
        if peak > some + each * bytes.len() {
            broken(format!("takes {peak} bytes of memory for"));
        }
        self.counts.inputs += 1;
        self.counts.accepted += u64::from(accepted);
        accepted
    }

    fn some(&mut self) -> &[u8] {
        let sound = self.target.corpus.len();
        let at = self.dice.below(sound + self.kept.len());
        self.target.corpus.get(at).unwrap_or_else(|| &self.kept[at - sound])
    }

    fn damaged(&mut self) -> Vec<u8> {
        let mut bytes = self.some().to_vec();
        for _ in 0..=self.dice.below(4) {
            self.damage(&mut bytes);
        }
        bytes.truncate(LONGEST);
        if let Some(mend) = self.target.mend.filter(|_| self.dice.below(4) > 0) {
            mend(&mut bytes);
        }
        bytes
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        /// What lengths and counts are broken with.
        const NUMBERS: [u64; 10] =
            [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];
        let words = self.target.words;
        let dice = &mut self.dice;
        let at = dice.below(bytes.len());
        match dice.below(if words.is_empty() { 9 } else { 15 }) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
            1 if !bytes.is_empty() => bytes[at] = dice.below(256) as u8,
            2 => bytes.truncate(at),
            3 => bytes.insert(at, dice.below(256) as u8),
            4 if !bytes.is_empty() => {
                bytes.remove(at);
            }
            5 => {
                let number = NUMBERS[dice.below(NUMBERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][dice.below(4)];
                for (to, from) in bytes[at..].iter_mut().zip(&number[..width]) {
                    *to = *from;
                }
            }
            6 => {
                // A piece of it once more.
                let end = (at + 1 + dice.below(64)).min(bytes.len());
                let piece = bytes[at.min(end)..end].to_vec();
                let to = dice.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            7 => {
                // A number a little larger or smaller.
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = byte.wrapping_add(dice.below(9) as u8).wrapping_sub(4);
                }
            }
            8 => {
                // The beginning of one, the end of another.
                let other = self.some().to_vec();
                let from = self.dice.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                // A word, put in or in the place of a little.
                let end = (at + dice.below(2) * dice.below(24)).min(bytes.len());
                let word = words.get(dice.below(words.len())).copied().unwrap_or_default();
                bytes.splice(at.min(end)..end, word.bytes());
            }
        }
    }
}
