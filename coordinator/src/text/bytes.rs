//! GPT-2's alphabet: every byte as one printable character.
//!
//! Printable Latin-1 bytes stand for themselves; the other 68 take U+0100 and up, in byte order.

use std::sync::LazyLock;

fn printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// The byte that a character of the alphabet stands for.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    if let Ok(byte) = u8::try_from(code)
        && printable(byte)
    {
        return Some(byte);
    }
    let n = code.checked_sub(0x100)? as usize;
    (0..=255u8).filter(|&b| !printable(b)).nth(n)
}

/// The bytes that a token's text stands for; characters outside the alphabet stand for themselves.
pub(super) fn decode_into(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match TABLE.get(c as usize).copied().flatten() {
            Some(byte) => out.push(byte),
            None => out.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// [`byte_of`] for all characters that can have one.
static TABLE: LazyLock<[Option<u8>; 0x200]> =
    LazyLock::new(|| std::array::from_fn(|i| char::from_u32(i as u32).and_then(byte_of)));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut found: Vec<u8> = TABLE.iter().flatten().copied().collect();
        found.sort_unstable();
        assert_eq!(found, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('a'), Some(b'a'));
        assert_eq!(byte_of('世'), None);
    }
}
