//! SentencePiece's normalisation: characters replaced by a table, spaces spelled `▁`.
//!
//! After `Normalizer::Normalize` of SentencePiece (`src/normalizer.cc`). The table is a double array
//! ("Darts") from byte sequences to replacements, as files carry it; every index into it is checked,
//! so no file can do harm. Special tokens are cut out of the text before.

use super::TextError;
use super::table::SPACE;

/// Largest table; that of NFKC has a quarter of a megabyte.
const MAX_TABLE: usize = 16 << 20;

/// Longest replacement in bytes; NFKC has one of 33 (U+FDFA).
const MAX_REPLACEMENT: usize = 256;

/// What is done to a text before it is cut into pieces.
#[derive(Debug, Default)]
pub(super) struct Normalizer {
    /// Characters that are replaced.
    pub(super) table: Option<CharsMap>,
    /// Every text begins with a space.
    pub(super) prefix_space: bool,
    /// Spaces at the ends go, and several become one.
    pub(super) merge_spaces: bool,
}

impl Normalizer {
    /// The normal form.
    pub(super) fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len() + text.len() / 4 + SPACE.len());
        let mut after_space = self.merge_spaces;
        let mut rest = text;
        while !rest.is_empty() {
            let (mut piece, consumed) = self.next(rest);
            rest = &rest[consumed..];
            if after_space {
                piece = piece.trim_start_matches(' ');
            }
            if piece.is_empty() {
                continue;
            }
            if out.is_empty() && self.prefix_space {
                out.push_str(SPACE);
            }
            for c in piece.chars() {
                if c == ' ' { out.push_str(SPACE) } else { out.push(c) }
            }
            after_space = self.merge_spaces && piece.ends_with(' ');
        }
        if self.merge_spaces {
            let kept = out.trim_end_matches(SPACE).len();
            out.truncate(kept);
        }
        out
    }

    /// The normal form of the longest beginning that has one, and its length in bytes.
    fn next<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some(found) = self.table.as_ref().and_then(|t| t.longest(text)) {
            return found;
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (&text[..length], length)
    }
}

/// A table of replacements.
#[derive(Debug)]
pub(super) struct CharsMap {
    units: Vec<u32>,
    /// Replacements, each ended by a zero.
    texts: Vec<u8>,
}

impl CharsMap {
    /// Reads a table: its length in bytes, the double array, the replacements.
    ///
    /// # Errors
    /// If it is not sound.
    pub(super) fn read(blob: &[u8]) -> Result<Self, TextError> {
        let unsound = |why: &str| {
            TextError::Vocabulary(format!("its table of replaced characters is unsound ({why})"))
        };
        let Some((length, rest)) = blob.split_first_chunk::<4>() else {
            return Err(unsound("it is empty"));
        };
        let length = u32::from_le_bytes(*length) as usize;
        if blob.len() > MAX_TABLE || length > rest.len() || !length.is_multiple_of(4) {
            return Err(unsound("its length is wrong"));
        }
        let (units, texts) = rest.split_at(length);
        let units = units.chunks_exact(4).map(|u| u32::from_le_bytes([u[0], u[1], u[2], u[3]]));
        Ok(Self { units: units.collect(), texts: texts.to_vec() })
    }

    /// The replacement of the longest beginning of `text` that has one, and that beginning's length.
    fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut found = None;
        let mut node = offset(*self.units.first()?);
        for (i, byte) in text.bytes().enumerate() {
            node ^= usize::from(byte);
            let Some(&unit) = self.units.get(node) else { break };
            if byte == 0 || unit & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                let Some(&leaf) = self.units.get(node) else { break };
                found = Some(((leaf & 0x7fff_ffff) as usize, i + 1));
            }
        }
        let (start, length) = found?;
        let replacement = self.texts.get(start..)?;
        let end = replacement.iter().take(MAX_REPLACEMENT + 1).position(|&b| b == 0)?;
        let replacement = std::str::from_utf8(&replacement[..end]).ok()?;
        text.is_char_boundary(length).then_some((replacement, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces() {
        let normal = |prefix_space, merge_spaces, text: &str| {
            Normalizer { table: None, prefix_space, merge_spaces }.apply(text)
        };
        assert_eq!(normal(true, false, " a  b "), "▁▁a▁▁b▁");
        assert_eq!(normal(true, true, "  a  b "), "▁a▁b");
        assert_eq!(normal(false, true, "  a  b "), "a▁b");
        assert_eq!(normal(true, true, "   "), "");
        assert_eq!(normal(true, false, ""), "");
    }

    #[test]
    fn unsound_tables_do_no_harm() {
        assert!(CharsMap::read(&[]).is_err());
        assert!(CharsMap::read(&[5, 0, 0, 0, 1]).is_err());
        let mut state = 1u32;
        for _ in 0..2000 {
            let mut blob = 400u32.to_le_bytes().to_vec();
            for _ in 0..400 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                blob.push((state >> 24) as u8 & if state & 64 == 0 { 0x03 } else { 0xff });
            }
            blob.extend_from_slice(b"abc\0def");
            let table = CharsMap::read(&blob).unwrap();
            let normal = Normalizer { table: Some(table), prefix_space: true, merge_spaces: true };
            let text: String = ('\0'..'\u{2ff}').collect();
            normal.apply(&text);
        }
    }
}
