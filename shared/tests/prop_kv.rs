//! Any order of operations on the KV block manager keeps every block accounted for.

use std::collections::BTreeMap;

use millrace_shared::id::{BlockId, SequenceId};
use millrace_shared::kv::KvBlockManager;
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
}

fn op() -> impl Strategy<Value = Op> {
    let seq = 0..SEQUENCES;
    let position = 0..BLOCKS * BLOCK_SIZE + 8;
    prop_oneof![
        4 => (seq.clone(), position.clone()).prop_map(|(s, p)| Op::Allocate(s, p)),
        2 => (seq.clone(), seq.clone()).prop_map(|(a, b)| Op::Fork(a, b)),
        2 => (seq.clone(), position.clone(), position).prop_map(|(s, a, b)| Op::Write(s, a.min(b), a.max(b))),
        2 => seq.prop_map(Op::Free),
    ]
}

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

fn apply(kv: &mut KvBlockManager, op: &Op) {
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
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_block_is_accounted_for(ops in prop::collection::vec(op(), 1..80)) {
        let mut kv = KvBlockManager::new(BLOCKS, BLOCK_SIZE);
        for op in &ops {
            apply(&mut kv, op);
            check(&kv);
        }
        for s in 0..SEQUENCES {
            kv.free(SequenceId(s));
        }
        prop_assert_eq!(kv.used(), 0);
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
