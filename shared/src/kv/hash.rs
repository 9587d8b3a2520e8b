//! Names of block contents.

/// The content of a full block: its own tokens and all before them.
///
/// Keys and values of a position depend on every token up to it, so a block is named by a chain:
/// the hash of the block before it and its own token ids (Kwon et al. 2023, section 4.3, and vLLM's
/// automatic prefix caching). With 256 bits of BLAKE3 nobody can make two contents share a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The block of `tokens` that follows the block `parent`; `None` for the first one.
    pub fn chain(parent: Option<&Self>, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        // A first block and a later one never hash the same bytes.
        hasher.update(&[u8::from(parent.is_some())]);
        if let Some(parent) = parent {
            hasher.update(&parent.0);
        }
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// Where the chains of one client begin that shares nothing with others: of no tokens at all.
    pub fn of_client(client: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        // Neither a first block nor a later one begins so.
        hasher.update(&[2]).update(&client.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The names of all full blocks of `tokens` beyond those that `chain` has, appended to it; the
    /// first one follows `root`. `block_size` is at least 1.
    pub fn extend(chain: &mut Vec<Self>, root: Option<&Self>, tokens: &[u32], block_size: u32) {
        let size = block_size.max(1) as usize;
        for block in tokens.chunks_exact(size).skip(chain.len()) {
            let next = Self::chain(chain.last().or(root), block);
            chain.push(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_covers_all_tokens_before() {
        let mut chain = Vec::new();
        let mut other = Vec::new();
        BlockHash::extend(&mut chain, None, &[1, 2, 3, 4, 5], 2);
        BlockHash::extend(&mut other, None, &[9, 2, 3, 4], 2);
        assert_eq!(chain.len(), 2);
        assert_ne!(chain[1], other[1], "the same tokens after others are another content");
        let first = chain.clone();
        BlockHash::extend(&mut chain, None, &[1, 2, 3, 4, 5, 6], 2);
        assert_eq!((chain.len(), &chain[..2]), (3, &first[..]));
        assert_ne!(BlockHash::chain(None, &[1, 2]), BlockHash::chain(None, &[2, 1]));
        let of = |client| {
            let (mut chain, root) = (Vec::new(), BlockHash::of_client(client));
            BlockHash::extend(&mut chain, Some(&root), &[1, 2, 3, 4, 5, 6], 2);
            chain
        };
        assert_eq!(of(7), of(7));
        let apart = [of(7), of(8), chain].concat();
        let distinct: std::collections::BTreeSet<_> = apart.iter().collect();
        assert_eq!(distinct.len(), 9, "clients that do not share have no name in common");
    }
}
