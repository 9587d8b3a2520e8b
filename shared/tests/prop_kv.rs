//! Any order of operations on the KV block manager keeps every block accounted for.

use std::collections::BTreeMap;

use millrace_shared::id::{BlockId, SequenceId};
use millrace_shared::kv::{BlockHash, KvBlockManager};
use proptest::prelude::*;

const BLOCKS: u32 = 24;
const BLOCK_SIZE: u32 = 4;
const SEQUENCES: u64 = 6;

#[derive(Clone, Debug)]
enum Op {
    Allocate(u64, u32),
    Fork(u64, u64),
    Write(u64, u32, u32),
    Free(u64),
    /// Writes the first positions of a sequence that owns its blocks, and publishes the full ones.
    Publish(u64, u32),
    Adopt(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let seq = 0..SEQUENCES;
    let position = 0..BLOCKS * BLOCK_SIZE + 8;
    prop_oneof![
        4 => (seq.clone(), position.clone()).prop_map(|(s, p)| Op::Allocate(s, p)),
        2 => (seq.clone(), seq.clone()).prop_map(|(a, b)| Op::Fork(a, b)),
        2 => (seq.clone(), position.clone(), position).prop_map(|(s, a, b)| Op::Write(s, a.min(b), a.max(b))),
        3 => seq.clone().prop_map(Op::Free),
        4 => (seq.clone(), 0..BLOCKS).prop_map(|(s, n)| Op::Publish(s, n)),
        4 => seq.prop_map(Op::Adopt),
    ]
}

/// The contents of a sequence's blocks: sequences 0 and 3, 1 and 4, … are of the same tokens in the
/// first eight blocks, and pairs of families in the first two.
fn contents(sequence: u64) -> Vec<BlockHash> {
    let token = |i: u32| match i / BLOCK_SIZE {
        0..2 => (sequence % 3 / 2) as u32,
        2..8 => (sequence % 3) as u32,
        _ => sequence as u32,
    };
    let tokens: Vec<u32> = (0..BLOCKS * BLOCK_SIZE).map(token).collect();
    let mut chain = Vec::new();
    BlockHash::extend(&mut chain, None, &tokens, BLOCK_SIZE);
    chain
}

/// What lies in each block; `None` where that is nobody's promise.
type Memory = BTreeMap<BlockId, BlockHash>;

/// Tables and free list as they must be, from the outside.
fn check(kv: &KvBlockManager) {
    let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
    for seq in kv.sequences() {
        let table = kv.table(seq);
        for (i, &block) in table.iter().enumerate() {
            assert!(block.0 < BLOCKS);
            assert!(!table[..i].contains(&block), "{block} twice in one table");
            *holders.entry(block).or_default() += 1;
        }
    }
    for block in (0..BLOCKS).map(BlockId) {
        assert_eq!(kv.references(block), holders.get(&block).copied().unwrap_or(0), "{block}");
    }
    assert_eq!(kv.used() as usize, holders.len());
    assert_eq!(kv.used() + kv.free_blocks(), BLOCKS);
}

fn apply(kv: &mut KvBlockManager, memory: &mut Memory, op: &Op) {
    let tables = |kv: &KvBlockManager| -> Vec<Vec<BlockId>> {
        (0..SEQUENCES).map(|s| kv.table(SequenceId(s)).to_vec()).collect()
    };
    let before = tables(kv);
    let free_before = kv.free_blocks();
    let of = |s: u64| &before[s as usize];
    match *op {
        Op::Allocate(s, positions) => {
            let missing = kv.blocks_for(positions).saturating_sub(of(s).len() as u32);
            let possible = kv.can_allocate(missing);
            match kv.allocate(SequenceId(s), positions) {
                Some(added) => {
                    assert!(possible);
                    assert_eq!(added.len() as u32, missing);
                    assert!(added.iter().all(|&b| kv.references(b) == 1));
                    // Whoever gets a block will write it.
                    memory.retain(|block, _| !added.contains(block));
                    assert_eq!(kv.table(SequenceId(s)), [of(s).clone(), added].concat());
                }
                None => {
                    assert!(!possible);
                    assert_eq!((tables(kv), kv.free_blocks()), (before, free_before));
                }
            }
        }
        Op::Fork(a, b) => {
            let possible = a != b && !of(a).is_empty() && of(b).is_empty();
            assert_eq!(kv.fork(SequenceId(a), SequenceId(b)), possible);
            assert_eq!(kv.free_blocks(), free_before, "sharing costs nothing");
            if possible {
                assert_eq!(kv.table(SequenceId(b)), of(a).as_slice());
            }
        }
        Op::Write(s, first, end) => match kv.prepare_write(SequenceId(s), first, end) {
            Some(copies) => {
                let table = kv.table(SequenceId(s));
                for p in (first..end).step_by(BLOCK_SIZE as usize).chain(first..end.min(first + 1))
                {
                    if let Some(&block) = table.get((p / BLOCK_SIZE) as usize) {
                        assert_eq!(kv.references(block), 1, "written blocks are one's own");
                        memory.remove(&block);
                    }
                }
                for copy in &copies {
                    assert_eq!(of(s)[copy.index as usize], copy.from);
                    assert_eq!(table[copy.index as usize], copy.to);
                }
                assert_eq!(kv.free_blocks() + copies.len() as u32, free_before);
            }
            None => assert_eq!((tables(kv), kv.free_blocks()), (before, free_before)),
        },
        Op::Free(s) => {
            let alone = of(s).iter().filter(|&&b| kv.references(b) == 1).count() as u32;
            assert_eq!(kv.free(SequenceId(s)), alone);
            assert!(kv.table(SequenceId(s)).is_empty());
        }
        Op::Publish(s, blocks) => {
            let contents = contents(s);
            let own = |(i, b): &(usize, &BlockId)| {
                kv.references(**b) == 1 || memory.get(b) == Some(&contents[*i])
            };
            let n = of(s).iter().enumerate().take(blocks as usize).take_while(own).count();
            for (i, &block) in of(s).iter().enumerate().take(n) {
                // What was shared may only be published as what it is.
                if kv.references(block) == 1 && memory.get(&block) != Some(&contents[i]) {
                    let copies = kv.prepare_write(
                        SequenceId(s),
                        i as u32 * BLOCK_SIZE,
                        (i as u32 + 1) * BLOCK_SIZE,
                    );
                    assert_eq!(copies, Some(Vec::new()));
                    memory.insert(block, contents[i]);
                }
                kv.publish(SequenceId(s), i as u32, contents[i]);
            }
            assert_eq!(kv.table(SequenceId(s)), of(s).as_slice());
            assert_eq!(kv.free_blocks(), free_before, "what is held stays held");
            assert_eq!(kv.cached_prefix(&contents[..n]).0 as usize, n, "published is found");
        }
        Op::Adopt(s) => {
            let contents = contents(s);
            let (found, free) = kv.cached_prefix(&contents);
            let adopted = kv.adopt(SequenceId(s), &contents);
            if !of(s).is_empty() {
                assert_eq!(adopted, 0);
                return;
            }
            assert_eq!(adopted, found);
            assert_eq!(kv.free_blocks(), free_before - free);
            let table = kv.table(SequenceId(s));
            assert_eq!(table.len() as u32, found);
            for (block, content) in table.iter().zip(&contents) {
                assert_eq!(memory.get(block), Some(content), "a cached block holds what it says");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_block_is_accounted_for(ops in prop::collection::vec(op(), 1..80)) {
        let mut kv = KvBlockManager::new(BLOCKS, BLOCK_SIZE);
        let mut memory = Memory::new();
        for op in &ops {
            apply(&mut kv, &mut memory, op);
            check(&kv);
        }
        for s in 0..SEQUENCES {
            kv.free(SequenceId(s));
        }
        prop_assert_eq!(kv.used(), 0);
        prop_assert_eq!(kv.free_blocks(), BLOCKS, "cached blocks are free");
        let all = kv.allocate(SequenceId(0), BLOCKS * BLOCK_SIZE).map(|b| b.len() as u32);
        prop_assert_eq!(all, Some(BLOCKS));
        prop_assert_eq!(kv.cached(), 0);
    }
}

#[test]
fn a_forked_sequence_copies_only_what_it_writes() {
    let mut kv = KvBlockManager::new(8, 4);
    let (a, b) = (SequenceId(1), SequenceId(2));
    kv.allocate(a, 10).unwrap();
    assert!(kv.fork(a, b));
    assert_eq!(kv.used(), 3);
    let copies = kv.prepare_write(b, 10, 11).unwrap();
    assert_eq!(copies.len(), 1);
    assert_eq!(copies[0].index, 2);
    assert_eq!(kv.table(a)[..2], kv.table(b)[..2]);
    assert_ne!(kv.table(a)[2], kv.table(b)[2]);
    assert_eq!(kv.used(), 4);
    assert!(kv.prepare_write(a, 10, 11).unwrap().is_empty(), "the other is alone again");
}

#[test]
fn blocks_freed_last_are_used_first() {
    let mut kv = KvBlockManager::new(8, 4);
    kv.allocate(SequenceId(1), 12).unwrap();
    kv.allocate(SequenceId(2), 4).unwrap();
    let table = kv.table(SequenceId(1)).to_vec();
    kv.free(SequenceId(1));
    assert_eq!(kv.allocate(SequenceId(3), 12).unwrap(), table);
}

/// `n` full blocks under the name of sequence 0's tokens.
fn publish(kv: &mut KvBlockManager, sequence: u64, n: u32) {
    kv.allocate(SequenceId(sequence), n * 4).expect("free blocks");
    for (i, content) in contents(sequence).into_iter().enumerate().take(n as usize) {
        kv.publish(SequenceId(sequence), i as u32, content);
    }
}

#[test]
fn the_cache_loses_the_longest_unused_and_the_ends_first() {
    let mut kv = KvBlockManager::new(10, 4);
    publish(&mut kv, 2, 4);
    publish(&mut kv, 1, 4);
    kv.free(SequenceId(2));
    kv.free(SequenceId(1));
    assert_eq!((kv.used(), kv.cached(), kv.free_blocks()), (0, 8, 10));
    // Blank ones go first,
    kv.allocate(SequenceId(9), 8).unwrap();
    assert_eq!(kv.cached(), 8);
    // then the end of what was used longest ago.
    kv.allocate(SequenceId(9), 16).unwrap();
    assert_eq!(kv.cached_prefix(&contents(2)), (2, 2));
    assert_eq!(kv.cached_prefix(&contents(1)), (4, 4));
    // Whatever is used again is young again.
    assert_eq!(kv.adopt(SequenceId(2), &contents(2)), 2);
    kv.free(SequenceId(2));
    kv.allocate(SequenceId(9), 32).unwrap();
    assert_eq!(kv.cached_prefix(&contents(1)), (0, 0));
    assert_eq!(kv.cached_prefix(&contents(2)), (2, 2));
}

#[test]
fn a_published_block_that_is_written_leaves_the_cache() {
    let mut kv = KvBlockManager::new(8, 4);
    publish(&mut kv, 0, 2);
    assert_eq!(kv.prepare_write(SequenceId(0), 4, 8), Some(Vec::new()));
    assert_eq!(kv.cached_prefix(&contents(0)), (1, 0));
    // Shared, it is copied and stays.
    assert_eq!(kv.adopt(SequenceId(3), &contents(3)), 1);
    assert_eq!(kv.prepare_write(SequenceId(3), 0, 4).unwrap().len(), 1);
    assert_eq!(kv.cached_prefix(&contents(0)), (1, 0));
}
