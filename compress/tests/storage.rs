//! Files without zeros: as small as they can be, and the same model to the bit.

#![allow(clippy::unwrap_used)]

#[path = "../../node/engine/tests/families/case.rs"]
mod case;
#[path = "../../node/engine/tests/families/gguf.rs"]
mod gguf;
mod tiny;

use std::path::Path;

use millrace_compress::{Source, StepReport};
use millrace_engine::quantize::{self, Options};
use millrace_shared::model::gguf::Gguf;
use millrace_shared::model::{ModelFiles, SparseForm, SparseForms, TensorType, is_sparse};
use tiny::{VOCAB, model, names, step, through, tokens};

fn stored(from: &Path, to: &Path, form: &str) -> StepReport {
    step(from, to, &format!("method = 'storage', form = '{form}'"), &[]).unwrap()
}

/// How a matrix of the second layer is kept.
fn form_of(path: &Path) -> Option<SparseForm> {
    let files = ModelFiles::open(path).unwrap();
    let up = files.tensor("blk.1.ffn_up.weight").unwrap();
    assert_eq!(up.dims, [64, 128]);
    SparseForms::of_tensors(&files.tensors).of(up)
}

#[test]
fn every_form_is_the_same_model_at_one_stage_and_at_three() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let text = tokens(40);
    for (i, (prune, best)) in [
        ("method = 'magnitude', sparsity = 0.98", SparseForm::Csr),
        ("method = 'random', sparsity = 0.5, pattern = '2:4'", SparseForm::Bitmask),
        ("method = 'magnitude', sparsity = 0.75, pattern = 'tile'", SparseForm::Tiles),
    ]
    .into_iter()
    .enumerate()
    {
        let pruned = dir.path().join(format!("{i}.gguf"));
        step(&path, &pruned, prune, &[]).unwrap();
        let dense = Source::open(&pruned).unwrap();
        let expected = through(&pruned, &[0, 4], &text);
        assert_eq!(expected.len(), text.len() * VOCAB as usize);
        let sizes = ["auto", "csr", "bitmask", "tiles"].map(|form| {
            let small = dir.path().join(format!("{i}-{form}.gguf"));
            let report = stored(&pruned, &small, form);
            assert_eq!(report.bytes_before, dense.weight_bytes());
            assert_eq!(report.bytes_stored, ModelFiles::open(&small).unwrap().weight_bytes());
            assert_eq!(report.tensors.len(), 28, "{:?}", report.notes);
            assert!(report.tensors.iter().all(|t| t.to.starts_with("F32 ")));
            let kept = form_of(&small).unwrap();
            assert_eq!(kept.as_str(), if form == "auto" { best.as_str() } else { form });
            assert!(through(&small, &[0, 4], &text) == expected, "{prune}, {form}");
            assert!(through(&small, &[0, 1, 2, 4], &text) == expected, "{prune}, {form}");
            report.bytes_stored
        });
        assert!(
            sizes[0] < dense.weight_bytes() && sizes[0] <= sizes[1].min(sizes[2]).min(sizes[3])
        );
        // Steps read it with its zeros, and what they write has them.
        let again = dir.path().join(format!("{i}-again.gguf"));
        let small = dir.path().join(format!("{i}-auto.gguf"));
        stored(&small, &again, "dense");
        assert!(!is_sparse(&Gguf::open(&again).unwrap().metadata) && form_of(&again).is_none());
        let again = Source::open(&again).unwrap();
        assert_eq!(again.tensors.len(), dense.tensors.len());
        for (a, b) in again.tensors.iter().zip(&dense.tensors) {
            assert_eq!((&a.name, &a.dims, a.dtype), (&b.name, &b.dims, b.dtype));
            assert!(again.floats(a).unwrap() == dense.floats(b).unwrap(), "{}", a.name);
        }
    }
}

#[test]
fn tiles_of_blocks_are_as_small_as_what_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let at = |name: &str| dir.path().join(name);
    step(&path, &at("a"), "method = 'magnitude', sparsity = 0.75, pattern = 'tile'", &[]).unwrap();
    step(&at("a"), &at("b"), "method = 'quantise', type = 'q8_0'", &[]).unwrap();
    let report = stored(&at("b"), &at("c"), "auto");
    assert_eq!(form_of(&at("c")), Some(SparseForm::Tiles));
    for t in &report.tensors {
        assert_eq!(t.to, "Q8_0 tiles");
        let part = t.bytes_stored as f64 / t.bytes_before as f64;
        assert!((0.2..0.35).contains(&part), "{}: {part}", t.name);
    }
    let text = tokens(40);
    assert!(through(&at("c"), &[0, 1, 4], &text) == through(&at("b"), &[0, 4], &text));
    // A step on such a file is one on the model with its zeros.
    step(&at("c"), &at("d"), "method = 'drop-layers', count = 1", &tokens(300)).unwrap();
    assert_eq!(ModelFiles::open(&at("d")).unwrap().config.layers, 3);
    assert_eq!(form_of(&at("d")), None);
}

#[test]
fn matrices_without_zeros_stay_and_what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let at = |name: &str| dir.path().join(name);
    let report = stored(&path, &at("same"), "auto");
    assert!(report.tensors.is_empty() && report.notes[0].contains("all matrices have their zeros"));
    assert!(!is_sparse(&Gguf::open(at("same")).unwrap().metadata));
    let larger = stored(&path, &at("larger"), "csr");
    assert!(larger.notes.iter().any(|n| n.contains("take more bytes")), "{:?}", larger.notes);
    step(&path, &at("blocks"), "method = 'quantise', type = 'q8_0'", &[]).unwrap();
    let before = names(dir.path());
    let refused = step(&at("blocks"), &at("x"), "method = 'storage', form = 'csr'", &[]);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("Q8_0") && message.contains("tiles"), "{message}");
    // Others do not know such files.
    let options = Options::new(TensorType::Q4_0);
    let message = quantize::plan_of(&at("larger"), &options).unwrap_err().to_string();
    assert!(message.contains("storage") && message.contains("dense"), "{message}");
    assert_eq!(names(dir.path()), before);
}

/// Some families' files have several matrices in one tensor, which stays as it is.
#[test]
fn joined_matrices_stay_and_the_others_are_kept_without_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let file = gguf::write(&case::Case::read("phi3"), dir.path());
    let at = |name: &str| dir.path().join(name);
    step(&file, &at("pruned"), "method = 'magnitude', sparsity = 0.9", &[]).unwrap();
    let report = stored(&at("pruned"), &at("small"), "auto");
    let kept: Vec<&str> = report.tensors.iter().map(|t| t.name.as_str()).collect();
    let joined = |name: &&str| name.contains("attn_qkv") || name.contains("ffn_up");
    assert!(!kept.is_empty() && !kept.iter().any(joined), "{kept:?}");
    let layers = ModelFiles::open(&at("small")).unwrap().config.layers;
    let text: Vec<u32> = (0..20).collect();
    let expected = through(&at("pruned"), &[0, layers], &text);
    assert!(through(&at("small"), &[0, 1, layers], &text) == expected);
    assert!(report.bytes_stored < report.bytes_before);
}
