//! Every method on a tiny model of floats: results are sound files that compute, and nothing is left
//! where something cannot be done.

mod tiny;

use std::path::Path;

use millrace_compress::compare::{Original, Terms, judge};
use millrace_compress::recipe::{self, Recipe};
use millrace_compress::survey::{survey, variants};
use millrace_compress::{CompressError, Settings, Source, Step, apply, calibrate};
use millrace_engine::target::TargetError;
use millrace_shared::model::ModelFiles;
use tiny::{
    Deaf, FFN, HIDDEN, LAYERS, TERMS, VOCAB, model, names, settings, step, through, tokens, write,
};

#[test]
fn every_variant_of_the_table_computes() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    // It has four layers, two KV heads, and a width that is no multiple of 32 when narrower by so little.
    let too_much = ["drop 6 layers", "merge 6 pairs", "drop 2 KV heads", "width 89 %"];
    let chosen = variants(&path, None).unwrap();
    let (calibration, text) = (tokens(300), tokens(100));
    let all = survey(&path, &chosen, &text, &settings(&calibration), (TERMS, None), &mut |_, _| {})
        .unwrap();
    assert_eq!(all.len(), chosen.len() + 2);
    for entry in &all {
        if too_much.contains(&&*entry.name) {
            assert!(entry.failed.is_some(), "{}", entry.name);
            continue;
        }
        assert_eq!(entry.failed, None, "{}", entry.name);
        assert!(entry.quality.mean_nll.is_finite() && entry.quality.mean_nll > 0.0);
    }
    let kl = |name: &str| {
        let found = all.iter().find(|e| e.name == name).unwrap();
        found.quality.mean_kl.unwrap()
    };
    assert!(kl("original") < 1e-6);
    assert!(kl("q8_0") < 0.01 && kl("q8_0") < kl("q4_0") && kl("q4_0") < kl("binary row"));
    assert!(kl("random 5 %") < kl("random 50 %"));
    assert!(kl("svd 80 %") <= kl("svd 50 %"));
    assert!(kl("fixed 8.8 saturate") <= kl("fixed 8.8 wrap"));
    let bytes = |name: &str| all.iter().find(|e| e.name == name).unwrap().format_bytes;
    assert!(
        bytes("binary tensor") < bytes("binary row")
            && bytes("binary row") < bytes("q4_0")
            && bytes("drop 2 layers") < bytes("original")
    );
}

#[test]
fn compensation_and_importance_lower_the_error_of_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let calibration = tokens(400);
    let error = |i: usize, text: &str| {
        let target = dir.path().join(format!("{i}.gguf"));
        let report = step(&path, &target, text, &calibration).unwrap();
        (report.error(), report.output_error())
    };
    let (_, plain) = error(0, "method = 'magnitude', sparsity = 0.5, pattern = 'row'");
    let (_, wanda) = error(1, "method = 'wanda', sparsity = 0.5");
    // Nothing was calibrated for magnitudes, so only Wanda knows its outputs' error.
    assert_eq!(plain, None);
    let with = wanda.unwrap();
    assert!(with > 0.0 && with < 0.6, "{with}");
    let (_, coarse) = error(2, "method = 'quantise', type = 'q4_0', importance = true");
    let (_, fine) = error(3, "method = 'quantise', type = 'q8_0', importance = true");
    assert!(fine.unwrap() * 5.0 < coarse.unwrap());
}

#[test]
fn moments_are_of_what_matrices_see() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::open(&model(dir.path(), None)).unwrap();
    let text = tokens(300);
    let seen = calibrate(&source, &text, 1, true, &mut |_| {}).unwrap();
    assert_eq!(seen.influence.len(), LAYERS as usize);
    // What the first layer's queries see: normalised embeddings.
    let table = source.matrix(source.tensor("token_embd.weight").unwrap()).unwrap();
    let gain = source.floats(source.tensor("blk.0.attn_norm.weight").unwrap()).unwrap();
    let mut squares = vec![0f64; HIDDEN as usize];
    for &id in &text {
        let row = table.row(id as usize);
        let mean = row.iter().map(|x| f64::from(x * x)).sum::<f64>() / HIDDEN as f64;
        for ((s, &x), &g) in squares.iter_mut().zip(row).zip(&gain) {
            *s += (f64::from(x * g) / (mean + 1e-5).sqrt()).powi(2);
        }
    }
    let moments = seen.moments("blk.0.attn_v.weight").unwrap();
    assert_eq!(moments.positions, 300);
    for (a, b) in moments.squares.iter().zip(&squares) {
        assert!((a - b).abs() < 1e-3 * b, "{a} {b}");
    }
    assert_eq!(seen.key("blk.0.attn_v.weight"), Some("blk.0.attn_q.weight"));
    assert_eq!(seen.moments("blk.3.ffn_down.weight").unwrap().cols, FFN as usize);
}

#[test]
fn shapes_change_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let calibration = tokens(300);
    let config = |i: usize, text: &str| {
        let target = dir.path().join(format!("{i}.gguf"));
        step(&path, &target, text, &calibration).unwrap();
        let entry = judge("x", &target, &tokens(80), None, TERMS).unwrap();
        assert!(entry.quality.mean_nll.is_finite());
        ModelFiles::open(&target).unwrap().config
    };
    assert_eq!(config(0, "method = 'drop-layers', count = 1").layers, 3);
    assert_eq!(config(1, "method = 'keep-layers', layers = [3, 0]").layers, 2);
    assert_eq!(config(2, "method = 'merge-layers', count = 2").layers, 2);
    let heads = config(3, "method = 'drop-heads', count = 1");
    assert_eq!((heads.heads, heads.kv_heads, heads.head_dim), (2, 1, 16));
    assert_eq!(config(4, "method = 'drop-channels', fraction = 0.5").ffn, 64);
    let narrow = config(5, "method = 'width', hidden = 32");
    assert_eq!((narrow.hidden, narrow.head_dim, narrow.heads), (32, 16, 4));
}

/// Which weights are zeros: by tensor, output and input.
type Zeros<'a> = &'a dyn Fn(&str, u64, u64) -> bool;

/// A model some of whose weights are zeros.
fn with_zeros(dir: &Path, zeros: Zeros<'_>) -> std::path::PathBuf {
    let path = model(dir, None);
    let source = Source::open(&path).expect("a model");
    let mut bytes = std::fs::read(&path).expect("the model is read");
    for tensor in source.tensors.iter().filter(|t| t.dims.len() == 2) {
        for i in 0..tensor.elements() {
            if zeros(&tensor.name, i / tensor.dims[0], i % tensor.dims[0]) {
                let at = (tensor.offset + 4 * i) as usize;
                bytes[at..at + 4].fill(0);
            }
        }
    }
    std::fs::write(&path, bytes).expect("the model is written");
    path
}

/// What does nothing is what goes: the model says the same without it.
#[test]
fn what_does_nothing_goes_first() {
    let logits = |path: &Path| -> Vec<f32> {
        let layers = ModelFiles::open(path).unwrap().config.layers;
        through(path, &[0, layers], &tokens(24)).iter().map(|b| f32::from_bits(*b)).collect()
    };
    let zeros: [(&str, Zeros<'_>); 3] = [
        ("method = 'drop-layers', count = 1", &|name, _, _| {
            name == "blk.2.attn_output.weight" || name == "blk.2.ffn_down.weight"
        }),
        // The first of two KV heads with its two query heads of 16; another one in odd layers.
        ("method = 'drop-heads', count = 1", &|name, _, input| {
            let odd = Source::layer_of(name).is_some_and(|layer| layer % 2 == 1);
            name.ends_with("attn_output.weight") && (input / 32 == 0) != odd
        }),
        ("method = 'drop-channels', fraction = 0.5", &|name, _, input| {
            name.ends_with("ffn_down.weight") && input.is_multiple_of(2)
        }),
    ];
    for (text, zeros) in zeros {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (with_zeros(dir.path(), zeros), dir.path().join("out.gguf"));
        step(&path, &target, text, &tokens(300)).unwrap();
        let (before, after) = (logits(&path), logits(&target));
        let far = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-2, "{text}: {far}");
    }
    // Elements of the residual stream that are always zero.
    let dir = tempfile::tempdir().unwrap();
    let zeros = |name: &str, output: u64, input: u64| match name {
        "token_embd.weight" => input.is_multiple_of(2),
        _ => {
            let ends = name.ends_with("attn_output.weight") || name.ends_with("ffn_down.weight");
            ends && output.is_multiple_of(2)
        }
    };
    let (path, target) = (with_zeros(dir.path(), &zeros), dir.path().join("out.gguf"));
    step(&path, &target, "method = 'width', hidden = 32", &tokens(300)).unwrap();
    let table = |path: &Path| {
        let source = Source::open(path).unwrap();
        source.matrix(source.tensor("token_embd.weight").unwrap()).unwrap()
    };
    let odd: Vec<usize> = (0..HIDDEN as usize).filter(|i| i % 2 == 1).collect();
    assert_eq!(table(&target), table(&path).keep_cols(&odd));
}

#[test]
fn judging_leaves_the_thread_where_it_may_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let processors = || std::thread::available_parallelism().unwrap();
    let before = processors();
    let terms = Terms { threads: 2, ..TERMS };
    let mut original = Original::open(&path, &tokens(80), terms).unwrap();
    judge("x", &path, &tokens(80), Some(&mut original), terms).unwrap();
    assert_eq!(processors(), before);
}

#[test]
fn all_layers_kept_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let target = dir.path().join("same.gguf");
    step(&path, &target, "method = 'keep-layers', layers = [0, 1, 2, 3]", &[]).unwrap();
    let mut original = Original::open(&path, &tokens(80), TERMS).unwrap();
    let same = judge("x", &target, &tokens(80), Some(&mut original), TERMS).unwrap();
    assert!(same.quality.mean_kl.unwrap() < 1e-6);
    assert_eq!(same.quality.same_top, Some(1.0));
}

#[test]
fn factors_compute_what_the_matrices_did() {
    let dir = tempfile::tempdir().unwrap();
    // With queries, keys and values one below the other it is 24.
    let path = write(dir.path(), None, Some(8));
    let calibration = tokens(300);
    let mut original = Original::open(&path, &tokens(80), TERMS).unwrap();
    for (i, text) in [
        "method = 'low-rank', size = 0.6",
        "method = 'low-rank', energy = 0.9999",
        "method = 'low-rank', size = 0.6, aware = true",
    ]
    .into_iter()
    .enumerate()
    {
        let target = dir.path().join(format!("{i}.gguf"));
        let report = step(&path, &target, text, &calibration).unwrap();
        assert!(report.bytes_stored < report.bytes_before && report.error() < 1e-4, "{report:?}");
        let files = ModelFiles::open(&target).unwrap();
        let dims = |name: &str| files.tensors.iter().find(|t| t.name == name).unwrap().dims.clone();
        assert_eq!(dims("blk.1.attn_q_in.weight"), [HIDDEN, 32]);
        assert_eq!(dims("blk.1.attn_k.weight"), [32, 32]);
        let entry = judge("x", &target, &tokens(80), Some(&mut original), TERMS).unwrap();
        assert!(entry.quality.mean_kl.unwrap() < 1e-6, "{text}: {:?}", entry.quality);
    }
    // Factors are matrices of layers: what else there is can be done with them, but this.
    let (factored, next) = (dir.path().join("0.gguf"), dir.path().join("next.gguf"));
    step(&factored, &next, "method = 'quantise', type = 'q8_0', importance = true", &calibration)
        .unwrap();
    let entry = judge("x", &next, &tokens(80), Some(&mut original), TERMS).unwrap();
    assert!(entry.quality.mean_kl.unwrap() < 0.01, "{:?}", entry.quality);
    let twice = dir.path().join("twice.gguf");
    let error = step(&factored, &twice, "method = 'low-rank', size = 0.5", &[]).unwrap_err();
    assert!(error.to_string().contains("is factored already"), "{error}");
    assert!(!twice.exists());
}

#[test]
fn ranks_are_those_asked_for_or_what_a_budget_pays_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let target = |i: usize| dir.path().join(format!("{i}.gguf"));
    // Of 128 x 64 and 64 x 128 weights, rank 32 leaves three quarters; of 64 x 64 nothing.
    let report = step(&path, &target(0), "method = 'low-rank', rank = 32", &[]).unwrap();
    let files = ModelFiles::open(&target(0)).unwrap();
    let dims = |name: &str| files.tensors.iter().find(|t| t.name == name).map(|t| t.dims.clone());
    assert_eq!(dims("blk.0.ffn_down_in.weight"), Some(vec![FFN, 32]));
    assert_eq!(dims("blk.0.attn_output_in.weight"), None);
    let (least, all) = (report.bytes_stored, report.bytes_before);
    assert!(least < all, "{least} {all}");
    let mut errors = Vec::new();
    for (i, budget) in [least, (least + all) / 2, all].into_iter().enumerate() {
        let text = format!("method = 'low-rank', bytes = {budget}");
        let report = step(&path, &target(i + 1), &text, &[]).unwrap();
        assert!(report.bytes_stored <= budget, "{} of {budget}", report.bytes_stored);
        errors.push(report.error() * report.tensors.len() as f64);
    }
    assert!(errors[0] > errors[1] && errors[1] > errors[2] && errors[2] == 0.0, "{errors:?}");
    let error = step(&path, &target(9), "method = 'low-rank', bytes = 10000", &[]).unwrap_err();
    assert!(error.to_string().contains("the budget of 10000 bytes cannot be met"), "{error}");
    assert!(!target(9).exists());
}

#[test]
fn progress_is_of_all_that_is_read_and_never_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let source = Source::open(&path).unwrap();
    let calibration = tokens(300);
    for (i, text) in [
        "method = 'int8'",
        "method = 'magnitude', sparsity = 0.5, global = true",
        "method = 'mixed', bytes = 150000",
        "method = 'low-rank', size = 0.5",
        "method = 'low-rank', energy = 0.5",
        "method = 'drop-layers', count = 1",
    ]
    .into_iter()
    .enumerate()
    {
        let (step, mut told) = (Step::parse(text).unwrap(), Vec::new());
        let target = dir.path().join(format!("{i}.gguf"));
        let settings = settings(&calibration);
        apply(&source, &target, &step, &settings, &mut |done| told.push(done)).unwrap();
        let all = step.passes() * source.weight_bytes();
        assert!(told.is_sorted() && told.len() > LAYERS as usize, "{text}: {told:?}");
        let last = *told.last().unwrap();
        assert!(last <= all && last > all * 3 / 4, "{text}: {last} of {all}");
    }
}

#[test]
fn three_stages_compute_what_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let (calibration, text) = (tokens(300), tokens(48));
    for (i, method) in [
        "method = 'low-rank', size = 0.6, aware = true",
        "method = 'quantise', type = 'q4_0', gptq = true",
        "method = 'mixed', bytes = 150000",
        "method = 'sparsegpt', sparsity = 0.5",
        "method = 'drop-channels', fraction = 0.25",
    ]
    .into_iter()
    .enumerate()
    {
        let target = dir.path().join(format!("{i}.gguf"));
        step(&path, &target, method, &calibration).unwrap();
        let one = through(&target, &[0, 4], &text);
        assert_eq!(one.len(), text.len() * VOCAB as usize);
        assert_eq!(one, through(&target, &[0, 1, 2, 4], &text), "{method}");
    }
}

#[test]
fn a_table_goes_on_with_what_was_done() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let state = dir.path().join("state.json");
    let (chosen, text) = (variants(&path, Some("int8")).unwrap(), tokens(100));
    let run = |count: usize, text: &[u32]| {
        let how = (TERMS, Some(&*state));
        let chosen = &chosen[..count];
        survey(&path, chosen, text, &settings(&[]), how, &mut |_, _| {}).unwrap()
    };
    let (some, all) = (run(1, &text), run(2, &text));
    // Speeds never come out the same twice: these were not measured again.
    assert_eq!(all.len(), 4);
    for (all, some) in all.iter().zip(&some) {
        assert_eq!(all.name, some.name);
        // A number in JSON may lose its last bit.
        assert!((all.speed.decode / some.speed.decode - 1.0).abs() < 1e-9, "{all:?} {some:?}");
    }
    assert!(all[3].speed.beside.is_some_and(|b| b.iter().all(|&x| x > 0.0)));
    // Another text, another table.
    assert_ne!(run(1, &tokens(90))[0].quality, some[0].quality);
}

#[test]
fn budgets_are_kept_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let calibration = tokens(300);
    let target = dir.path().join("mixed.gguf");
    let error = step(&path, &target, "method = 'mixed', bytes = 1000", &calibration).unwrap_err();
    assert!(error.to_string().contains("the budget of 1000 bytes cannot be met"), "{error}");
    assert_eq!(names(dir.path()), ["tiny.gguf"]);
    let report = step(&path, &target, "method = 'mixed', bytes = 120000", &calibration).unwrap();
    assert!(
        report.bytes_stored <= 120_000 && report.bytes_stored > 100_000,
        "{}",
        report.bytes_stored
    );
}

#[test]
fn what_cannot_be_done_leaves_everything_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), Some("blk.2.ffn_up.weight"));
    let target = dir.path().join("out.gguf");
    let error = step(&path, &target, "method = 'quantise', type = 'q8_0'", &[]).unwrap_err();
    assert!(
        error.to_string().contains("tensor 'blk.2.ffn_up.weight', row 1: weight 6 is NaN"),
        "{error}"
    );
    assert_eq!(names(dir.path()), ["tiny.gguf"]);
    // Nor is a file replaced that is there.
    let path = model(dir.path(), None);
    std::fs::write(&target, "old").unwrap();
    let error = step(&path, &target, "method = 'binary'", &[]).unwrap_err();
    assert!(matches!(error, CompressError::Target(TargetError::Exists(_))));
    let error = step(&path, &path, "method = 'binary'", &[]).unwrap_err();
    assert!(error.to_string().contains("read and written at once"), "{error}");
    let error = step(&path, &target, "method = 'wanda', sparsity = 0.5", &tokens(50)).unwrap_err();
    assert!(matches!(error, CompressError::Target(TargetError::Exists(_))));
    let other = dir.path().join("other.gguf");
    let error = step(&path, &other, "method = 'wanda', sparsity = 0.5", &tokens(50)).unwrap_err();
    assert!(error.to_string().contains("the calibration text has 50 tokens"), "{error}");
    let error = step(&path, &other, "method = 'wanda', sparsity = 0.5", &[]).unwrap_err();
    assert!(error.to_string().contains("give a calibration text"), "{error}");
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["out.gguf", "tiny.gguf"]);
}

#[test]
fn only_files_take_the_place_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let forced = |target: &Path| {
        let source = Source::open(&path).unwrap();
        let settings = Settings { overwrite: true, ..settings(&[]) };
        let step = Step::parse("method = 'binary'").unwrap();
        apply(&source, target, &step, &settings, &mut |_| {}).map_err(|e| e.to_string())
    };
    let (folder, socket) = (dir.path().join("folder"), dir.path().join("socket"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("thesis"), "long").unwrap();
    let _listens = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(forced(&folder).unwrap_err().contains("is a folder, which a file does not replace"));
    assert!(forced(&socket).unwrap_err().contains("is no ordinary file"));
    assert!(forced(&dir.path().join("no/x.gguf")).unwrap_err().contains("there is no folder"));
    assert_eq!(names(&folder), ["thesis"]);
    assert_eq!(names(dir.path()), ["folder", "socket", "tiny.gguf"]);
    // Nor do recipes, which have names of their own for what they write.
    let recipe = |output: &Path| {
        let text = format!(
            "model = 'tiny.gguf'\noutput = '{}'\n[[step]]\nmethod = 'binary'\n",
            output.display()
        );
        let file = dir.path().join("r.toml");
        std::fs::write(&file, text).unwrap();
        let recipe = Recipe::open(&file).unwrap();
        let settings = Settings { overwrite: true, ..settings(&[]) };
        recipe::run(&recipe, &path, output, &settings, &mut Deaf).map_err(|e| e.to_string())
    };
    let before = std::fs::read(&path).unwrap();
    assert!(recipe(&folder).unwrap_err().contains("is a folder, which a file does not replace"));
    assert!(recipe(&path).unwrap_err().contains("read and written at once"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let other = dir.path().join("x.gguf.step1");
    std::fs::write(&other, "somebody's").unwrap();
    assert!(recipe(&dir.path().join("x.gguf")).unwrap_err().contains("x.gguf.step1 is there"));
    assert_eq!(std::fs::read(&other).unwrap(), b"somebody's");
    assert_eq!(names(dir.path()), ["folder", "r.toml", "socket", "tiny.gguf", "x.gguf.step1"]);
}

#[test]
fn weights_that_are_no_numbers_are_named_wherever_they_are() {
    let calibration = tokens(300);
    for (broken, column) in [("blk.1.ffn_up.weight", 6), ("token_embd.weight", 6)] {
        let dir = tempfile::tempdir().unwrap();
        let path = model(dir.path(), Some(broken));
        for (i, text) in [
            "method = 'magnitude', sparsity = 0.5",
            "method = 'wanda', sparsity = 0.5",
            "method = 'low-rank', size = 0.5",
            "method = 'drop-layers', count = 1",
            "method = 'keep-layers', layers = [0, 1]",
        ]
        .into_iter()
        .enumerate()
        {
            let target = dir.path().join(format!("{i}.gguf"));
            let error = step(&path, &target, text, &calibration).unwrap_err().to_string();
            let named = format!("tensor '{broken}', row 1: weight {column} is NaN");
            assert!(error.contains(&named), "{text}: {error}");
        }
        assert_eq!(names(dir.path()), ["tiny.gguf"]);
    }
}

/// Hears nothing.
#[test]
fn recipes_go_on_where_they_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), None);
    let (file, output) = (dir.path().join("r.toml"), dir.path().join("out.gguf"));
    let calibration = tokens(300);
    let run = |last: &str| {
        let text = format!(
            "model = 'tiny.gguf'\noutput = 'out.gguf'\nstore = 'f32'\n[[step]]\nmethod = 'wanda'\n\
             sparsity = 0.25\n[[step]]\nmethod = 'mixed'\nbytes = {last}\n"
        );
        std::fs::write(&file, text).unwrap();
        let recipe = Recipe::open(&file).unwrap();
        recipe::run(&recipe, &path, &output, &settings(&calibration), &mut Deaf)
    };
    assert!(run("7").unwrap_err().to_string().contains("budget of 7 bytes"));
    assert!(!output.exists() && dir.path().join("out.gguf.step1").exists());
    let report = run("150000").unwrap();
    assert_eq!((report.resumed, report.steps.len()), (1, 2));
    assert_eq!(names(dir.path()), ["out.gguf", "out.gguf.run.json", "r.toml", "tiny.gguf"]);
    // Cut off before anybody judged it: it is there, and is not made again.
    let kept = run("150000").unwrap();
    assert_eq!((kept.resumed, kept.steps.len(), &kept.result), (2, 2, &report.result));
    // Another recipe does not take it for its own.
    assert!(run("140000").unwrap_err().to_string().contains("is there already"));
    recipe::finished(&output);
    assert!(run("150000").unwrap_err().to_string().contains("is there already"));
    assert_eq!(names(dir.path()), ["out.gguf", "r.toml", "tiny.gguf"]);
    assert_eq!(
        report.result.blake3,
        blake3::hash(&std::fs::read(&output).unwrap()).to_hex().as_str()
    );
    // The same from the beginning gives the same bytes.
    std::fs::remove_file(&output).unwrap();
    let again = run("150000").unwrap();
    assert_eq!((again.resumed, &again.result.blake3), (0, &report.result.blake3));
}
