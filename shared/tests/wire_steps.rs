//! What a step's metadata may say of drafts.

use millrace_shared::id::SequenceId;
use millrace_shared::pooling::Pooling;
use millrace_shared::wire::data::{MAX_EMBEDDINGS, Row, StepMeta, Want};

fn row(sequence: u64, count: u32, want: Want) -> Row {
    Row { sequence: SequenceId(sequence), sequence_epoch: 0, position: 7, count, want }
}

#[test]
fn drafts_belong_to_the_rows_that_verify() {
    let rows = vec![
        row(1, 3, Want::Verify),
        row(2, 1, Want::Sample),
        row(3, 1, Want::Verify),
        row(4, 2, Want::Verify),
    ];
    let meta = StepMeta { rows, drafts: vec![5, 6, 7], ..StepMeta::default() };
    assert!(meta.validate(7).is_ok());
    let drafts: Vec<&[u32]> = (0..5).map(|i| meta.drafts_of(i)).collect();
    assert_eq!(drafts, [&[5, 6][..], &[], &[], &[7], &[]]);
    for drafts in [vec![], vec![5, 6], vec![5, 6, 7, 8]] {
        let meta = StepMeta { drafts, ..meta.clone() };
        let message = meta.validate(7).unwrap_err().to_string();
        assert!(message.contains("drafts for rows that verify 3"), "{message}");
        (0..5).for_each(|i| assert!(meta.drafts_of(i).len() <= meta.drafts.len()));
    }
}

#[test]
fn a_row_verifies_at_most_64_positions() {
    let meta = |count: u32| StepMeta {
        rows: vec![row(1, count, Want::Verify)],
        drafts: vec![0; count as usize - 1],
        ..StepMeta::default()
    };
    assert!(meta(64).validate(100).is_ok());
    let message = meta(65).validate(100).unwrap_err().to_string();
    assert!(message.contains("more than 64 positions"), "{message}");
}

#[test]
fn a_micro_batch_has_at_most_64_embeddings() {
    let meta = |embeddings: usize| {
        let embed = Want::Embed { pooling: Pooling::Mean };
        let mut rows: Vec<Row> = (0..embeddings as u64).map(|i| row(i, 1, embed)).collect();
        rows.push(row(999, 9, Want::Sum));
        StepMeta { rows, ..StepMeta::default() }
    };
    assert!(meta(MAX_EMBEDDINGS).validate(100).is_ok());
    let message = meta(MAX_EMBEDDINGS + 1).validate(100).unwrap_err().to_string();
    assert!(message.contains("65 embeddings"), "{message}");
}
