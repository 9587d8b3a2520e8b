//! Every step on every family, from a file and from a folder: the result opens and computes the same at one
//! stage and at several, or the step is refused for a known reason.

#![allow(clippy::unwrap_used)]

#[path = "../../node/engine/tests/families/case.rs"]
mod case;
#[path = "../../node/engine/tests/families/gguf.rs"]
mod gguf;
mod tiny;

use std::path::Path;

use case::{CASES, Case};
use millrace_compress::hessian::ALIKE;
use millrace_compress::{Source, calibrate};
use millrace_shared::model::{ModelFiles, TensorType};
use tiny::{names, step, through};

const STEPS: [&str; 27] = [
    "method = 'quantise', type = 'q8_0'",
    "method = 'quantise', type = 'q4_k', importance = true",
    "method = 'quantise', type = 'q4_0', gptq = true",
    "method = 'mixed', bytes = 150000",
    "method = 'int8', per = 'row'",
    "method = 'int8', per = 'tensor', affine = true",
    "method = 'fixed-point', fraction_bits = 6, bits = 8",
    "method = 'fixed-point', fraction_bits = 6, bits = 6, modulo = 61",
    "method = 'binary', per = 'row'",
    "method = 'magnitude', sparsity = 0.5",
    "method = 'magnitude', sparsity = 0.5, global = true",
    "method = 'magnitude', sparsity = 0.5, pattern = 'tile'",
    "method = 'signed-threshold', theta = 0.01",
    "method = 'clip', min = -0.1, max = 0.1",
    "method = 'random', sparsity = 0.5, pattern = '2:4'",
    "method = 'wanda', sparsity = 0.5",
    "method = 'sparsegpt', sparsity = 0.5",
    "method = 'low-rank', rank = 32",
    "method = 'low-rank', size = 0.8, aware = true",
    "method = 'drop-layers', count = 1",
    "method = 'keep-layers', layers = [0]",
    "method = 'merge-layers', count = 1",
    "method = 'drop-heads', count = 1",
    "method = 'drop-channels', fraction = 0.5",
    "method = 'width', hidden = 32",
    "method = 'storage'",
    "method = 'storage', form = 'bitmask'",
];

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + i * i % 11) % 64).collect()
}

fn logits(path: &Path) -> Vec<u32> {
    through(path, &[0, ModelFiles::open(path).unwrap().config.layers], &tokens(24))
}

/// What a step makes of a model: logits at one stage, or why there are none.
fn outcome(from: &Path, to: &Path, text: &str) -> Result<Vec<u32>, String> {
    step(from, to, text, &tokens(300)).map_err(|e| e.to_string())?;
    let layers = ModelFiles::open(to).unwrap_or_else(|e| panic!("{text}: {e}")).config.layers;
    let whole = through(to, &[0, layers], &tokens(24));
    assert!(whole.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{text}");
    let cuts: Vec<u32> = (0..=layers).collect();
    assert!(through(to, &cuts, &tokens(24)) == whole, "{text}: cut into {layers}");
    Ok(whole)
}

/// Part of a message where a step cannot be had.
fn expected(name: &str, folder: bool, text: &str) -> Option<&'static str> {
    let is =
        |methods: &[&str]| methods.iter().any(|m| text.starts_with(&format!("method = '{m}'")));
    let joined = name.starts_with("phi");
    let whole = is(&["drop-heads", "drop-channels", "width"]);
    match name {
        "gpt2" if folder => Some("lie the other way round"),
        "gpt2" if whole => Some("gpt2 models cannot be cut this way"),
        "gemma2" | "gemma3" if is(&["merge-layers"]) => Some("keep that rhythm"),
        "mixtral" if is(&["mixed"]) => Some("cannot be met: with the cheapest types"),
        _ if folder && is(&["storage"]) => Some("only GGUF files"),
        _ if joined && is(&["low-rank", "drop-heads", "drop-channels"]) => {
            Some("holds several matrices")
        }
        _ => None,
    }
}

fn has_experts(name: &str) -> bool {
    name == "mixtral" || name.ends_with("_moe")
}

/// Root of the mean square of what is between logits.
fn error(a: &[u32], b: &[u32]) -> f64 {
    let float = |bits: &u32| f64::from(f32::from_bits(*bits));
    let sum: f64 = a.iter().zip(b).map(|(a, b)| (float(a) - float(b)).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

/// Greatest difference, as part of the greatest logit.
fn difference(a: &[u32], b: &[u32]) -> f64 {
    let float = |bits: &u32| f64::from(f32::from_bits(*bits));
    let size = b.iter().map(float).fold(1e-9, |m: f64, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (float(a) - float(b)).abs()).fold(0.0, f64::max) / size
}

/// Whether file and folder lose the same: not where tensors compete for a budget, weights, or equal ones,
/// are chosen by their place, or gate and up, which some folders have in one tensor, share a scale.
fn is_alike(text: &str) -> bool {
    let not = ["'random'", "'mixed'", "'magnitude'", "per = 'tensor'"];
    !not.iter().any(|part| text.contains(part))
}

/// What each expert saw adds up to what the router sent, from files with all experts in a tensor and
/// from folders with a tensor for each.
#[test]
fn experts_see_the_rows_that_the_router_sends_them() {
    for name in CASES.into_iter().filter(|name| has_experts(name)) {
        let dir = tempfile::tempdir().unwrap();
        let case = Case::read(name);
        let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
        for path in [&*file, folder.path()] {
            let source = Source::open(path).unwrap();
            let seen = calibrate(&source, &tokens(600), 2, true, &mut |_| {}).unwrap();
            let experts = source.config.features.experts.unwrap();
            for layer in 0..source.config.layers {
                let of = |part: &str| seen.moments(&format!("blk.{layer}.{part}.weight")).unwrap();
                let sent = of("ffn_gate_inp");
                let (mut positions, mut squares) = (0, 0f64);
                for expert in 0..experts.count {
                    let [outer, up, inner] = ["ffn_gate", "ffn_up", "ffn_down"]
                        .map(|part| of(&format!("{part}.{expert}")));
                    assert_eq!((outer.positions, &outer.gram), (inner.positions, &up.gram));
                    positions += outer.positions - ALIKE;
                    // What an expert is taken to have seen beside it is as large on average.
                    let real = (outer.positions - ALIKE) as f64 / outer.positions as f64;
                    squares += outer.squares.iter().sum::<f64>() * real;
                    assert!(inner.squares.iter().all(|s| s.is_finite() && *s > 0.0));
                }
                assert_eq!(positions, sent.positions * u64::from(experts.used), "{name}");
                let wanted = sent.squares.iter().sum::<f64>() * f64::from(experts.used);
                assert!((squares / wanted - 1.0).abs() < 1e-5, "{name}: {squares}, not {wanted}");
            }
        }
    }
}

/// Compensation knows what each expert sees: outputs are nearer to the original's.
#[test]
fn experts_are_compensated_for() {
    for name in CASES.into_iter().filter(|name| has_experts(name)) {
        let dir = tempfile::tempdir().unwrap();
        let file = gguf::write(&Case::read(name), dir.path());
        let wanted = logits(&file);
        let lost = |text: &str| {
            let to = dir.path().join("x.gguf");
            step(&file, &to, text, &tokens(2000)).unwrap();
            let lost = error(&logits(&to), &wanted);
            std::fs::remove_file(&to).unwrap();
            lost
        };
        for (naive, better) in [
            (
                "method = 'quantise', type = 'q4_0'",
                "method = 'quantise', type = 'q4_0', gptq = true",
            ),
            (
                "method = 'magnitude', sparsity = 0.5, pattern = 'row'",
                "method = 'wanda', sparsity = 0.5",
            ),
            ("method = 'wanda', sparsity = 0.5", "method = 'sparsegpt', sparsity = 0.5"),
        ] {
            let (naive_lost, better_lost) = (lost(naive), lost(better));
            assert!(
                better_lost < naive_lost,
                "{name}: {better_lost} {better}, {naive_lost} {naive}"
            );
        }
    }
}

#[test]
fn every_step_makes_a_model_of_every_family_or_says_why_not() {
    let mut compared = 0;
    for name in CASES {
        let dir = tempfile::tempdir().unwrap();
        let case = Case::read(name);
        let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
        // Some folders state what GGUF has no key for.
        let same = difference(&logits(&file), &logits(folder.path())) < 1e-3;
        for text in STEPS {
            let [a, b] = ["x.gguf", "x"].map(|x| dir.path().join(x));
            let found =
                [(&*file, &a, false), (folder.path(), &b, true)].map(|(from, to, folder)| {
                    let found = outcome(from, to, text);
                    match (&found, expected(name, folder, text)) {
                        (Ok(_), None) => {}
                        (Err(said), Some(part)) => {
                            assert!(said.contains(part), "{name}: {text}: {said}");
                        }
                        (found, _) => {
                            panic!("{name}, folder: {folder}: {text}: {:?}", found.is_ok())
                        }
                    }
                    found
                });
            if let [Ok(a), Ok(b)] = &found
                && same
                && is_alike(text)
            {
                let difference = difference(a, b);
                assert!(difference < 0.03, "{name}: {text}: {difference}");
                compared += 1;
            }
            let _ = (std::fs::remove_file(&a), std::fs::remove_dir_all(&b));
            assert_eq!(names(dir.path()), ["model.gguf"], "{name}: {text}");
        }
    }
    assert!(compared > 150, "{compared}");
}
