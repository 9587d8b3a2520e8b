//! Steps from folder to folder make the models that they make from file to file.

#![allow(clippy::unwrap_used)]

#[path = "../../node/engine/tests/families/case.rs"]
mod case;
#[path = "../../node/engine/tests/families/gguf.rs"]
mod gguf;
mod tiny;

use std::path::Path;

use case::Case;
use millrace_compress::compare::judge;
use millrace_compress::quant::TYPES;
use millrace_compress::recipe::{self, Recipe};
use millrace_compress::{Settings, Source, StepReport};
use millrace_engine::quantize::{self, Options};
use millrace_shared::model::{FolderSource, ModelFiles, TensorType};
use serde_json::Value;
use tiny::{Deaf, TERMS, names, settings, step, through};

/// Its vocabulary has 64 tokens.
fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + i * i % 11) % 64).collect()
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

fn made(from: &Path, to: &Path, text: &str) -> StepReport {
    step(from, to, text, &tokens(300)).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Logits of both, from one stage, and of the folder from two too.
fn alike(folder: &Path, file: &Path, what: &str) {
    let layers = ModelFiles::open(folder).unwrap().config.layers;
    let text = tokens(30);
    let [a, b] = [folder, file].map(|path| through(path, &[0, layers], &text));
    assert!(!a.is_empty() && a.len() == b.len(), "{what}");
    assert!(a == through(folder, &[0, 1, layers], &text), "{what} at two stages");
    let float = |bits: &u32| f64::from(f32::from_bits(*bits));
    let size = b.iter().map(float).fold(1e-9, |m: f64, x| m.max(x.abs()));
    let worst = a.iter().zip(&b).map(|(a, b)| (float(a) - float(b)).abs()).fold(0.0, f64::max);
    // Halves of rotated heads lie in another order, so sums round otherwise.
    assert!(worst < 5e-3 * size, "{what}: {worst} of {size}");
}

/// What both have that no order of rows changes.
fn same_weights(folder: &Path, file: &Path, what: &str) {
    let (a, b) = (Source::open(folder).unwrap(), Source::open(file).unwrap());
    assert_eq!(a.tensors.len(), b.tensors.len(), "{what}");
    for tensor in &b.tensors {
        let other = a.tensor(&tensor.name).unwrap();
        assert_eq!(other.dims, tensor.dims, "{what}: {}", tensor.name);
        if tensor.name.contains("attn_q") || tensor.name.contains("attn_k") {
            continue;
        }
        assert!(a.floats(other).unwrap() == b.floats(tensor).unwrap(), "{what}: {}", tensor.name);
    }
}

#[test]
fn shapes_change_as_those_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::read("llama");
    // As published, in several files.
    let folder = case.folder(TensorType::F32, 2);
    let file = gguf::write(&case, dir.path());
    alike(folder.path(), &file, "the original");
    for (i, (text, expected)) in [
        ("method = 'keep-layers', layers = [1, 0]", ("num_hidden_layers", 2)),
        ("method = 'drop-layers', count = 1", ("num_hidden_layers", 0)),
        ("method = 'merge-layers', count = 1", ("num_hidden_layers", 0)),
        ("method = 'drop-heads', count = 1", ("num_key_value_heads", 1)),
        ("method = 'drop-channels', fraction = 0.5", ("intermediate_size", 0)),
        ("method = 'width', hidden = 32", ("hidden_size", 32)),
    ]
    .into_iter()
    .enumerate()
    {
        let (a, b) = (dir.path().join(format!("{i}")), dir.path().join(format!("{i}.gguf")));
        let (of_folder, of_file) = (made(folder.path(), &a, text), made(&file, &b, text));
        assert_eq!(of_folder.notes, of_file.notes, "{text}");
        let (new, old) = (config(&a), config(folder.path()));
        assert!(new.get("quantization_config").is_none(), "any library reads it");
        let (key, value) = expected;
        match value {
            0 => assert!(new[key].as_u64() < old[key].as_u64(), "{text}: {}", new[key]),
            value => assert_eq!(new[key].as_u64(), Some(value), "{text}"),
        }
        assert_eq!(
            (&new["vocab_size"], &new["rms_norm_eps"], &new["model_type"]),
            (&old["vocab_size"], &old["rms_norm_eps"], &old["model_type"])
        );
        // One file has it all, under the names of the library.
        assert_eq!(names(&a), ["config.json", "model.safetensors", "tokenizer.json"]);
        let bytes = std::fs::read(a.join("model.safetensors")).unwrap();
        let written = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let layers = new["num_hidden_layers"].as_u64().unwrap();
        for layer in 0..layers {
            let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
            let heads = new["num_attention_heads"].as_u64().unwrap();
            let rows = heads * new["head_dim"].as_u64().unwrap_or(16);
            let shape = written.tensor(&name).unwrap().shape().to_vec();
            assert_eq!(shape[0] as u64, rows, "{text}");
            assert_eq!(Some(shape[1] as u64), new["hidden_size"].as_u64(), "{text}");
        }
        let beyond = format!("model.layers.{layers}.");
        assert!(written.names().iter().all(|name| !name.starts_with(&beyond)), "{text}");
        alike(&a, &b, text);
        same_weights(&a, &b, text);
    }
}

#[test]
fn factors_are_read_and_computed_and_refused_by_others() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::read("llama");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    let at = |name: &str| dir.path().join(name);
    for text in
        ["method = 'low-rank', rank = 32", "method = 'low-rank', energy = 0.9, aware = true"]
    {
        let (a, b) = (at("factored"), at("factored.gguf"));
        let (of_folder, of_file) = (made(folder.path(), &a, text), made(&file, &b, text));
        assert_eq!(of_folder.tensors.len(), of_file.tensors.len(), "{text}");
        assert!(!of_folder.tensors.is_empty(), "{text}: {:?}", of_folder.notes);
        assert!(of_folder.notes.iter().any(|note| note.contains("other programs")));
        assert_eq!(config(&a)["quantization_config"]["quant_method"], "millrace");
        let files = ModelFiles::open(&a).unwrap();
        let inner = files.tensors.iter().find(|t| t.name.ends_with("_in.weight")).unwrap();
        assert!(inner.dims[1].is_multiple_of(32), "{:?}", inner.dims);
        alike(&a, &b, text);
        // Floats all the same: further steps go on from there.
        made(&a, &at("fewer"), "method = 'keep-layers', layers = [0]");
        made(&b, &at("fewer.gguf"), "method = 'keep-layers', layers = [0]");
        assert_eq!(config(&at("fewer"))["quantization_config"]["quant_method"], "millrace");
        let first = through(&at("fewer"), &[0, 1], &tokens(8));
        assert_eq!(first.len(), through(&at("fewer.gguf"), &[0, 1], &tokens(8)).len());
        let copy = at("eight");
        let plan = quantize::plan_of(&a, &Options::new(TensorType::Q8_0)).unwrap();
        plan.write(&copy, false, 2, &mut |_| {}).unwrap();
        through(&copy, &[0, 1, files.config.layers], &tokens(8));
        for path in [&a, &at("fewer"), &copy] {
            std::fs::remove_dir_all(path).unwrap();
        }
        for path in [&b, &at("fewer.gguf")] {
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_recipe_goes_from_folder_to_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Case::read("llama").folder(TensorType::BF16, 1);
    let path = dir.path().join("recipe.toml");
    let text = format!(
        "model = '{}'\noutput = 'small'\n\
         [[step]]\nmethod = 'wanda'\nsparsity = 0.25\n\
         [[step]]\nmethod = 'drop-layers'\ncount = 1\n\
         [[step]]\nmethod = 'low-rank'\nsize = 0.9\n\
         [[step]]\nmethod = 'quantise'\ntype = 'q8_0'\n",
        folder.path().display()
    );
    std::fs::write(&path, text).unwrap();
    let recipe = Recipe::open(&path).unwrap();
    let (calibration, output) = (tokens(300), dir.path().join("small"));
    let run =
        |settings: &Settings<'_>| recipe::run(&recipe, folder.path(), &output, settings, &mut Deaf);
    let report = run(&settings(&calibration)).unwrap();
    assert_eq!(report.steps.len(), 4);
    assert!(FolderSource::is_copy(&output));
    let first = through(&output, &[0, 1, 2], &tokens(20));
    let entry = judge("small", &output, &tokens(60), None, TERMS).unwrap();
    assert!(entry.quality.mean_nll.is_finite());
    recipe::finished(&output);
    assert_eq!(names(dir.path()), ["recipe.toml", "small"]);
    // Over itself if asked, and the same again.
    assert!(run(&settings(&calibration)).unwrap_err().to_string().contains("is there already"));
    run(&Settings { overwrite: true, ..settings(&calibration) }).unwrap();
    assert!(through(&output, &[0, 1, 2], &tokens(20)) == first);
    recipe::finished(&output);
    // With a slash behind the name it is the same, and what has no name is refused.
    let slash = output.join("");
    let settings = Settings { overwrite: true, ..settings(&calibration) };
    recipe::run(&recipe, folder.path(), &slash, &settings, &mut Deaf).unwrap();
    assert!(through(&output, &[0, 1, 2], &tokens(20)) == first);
    recipe::finished(&slash);
    assert_eq!(names(dir.path()), ["recipe.toml", "small"]);
    let nameless = dir.path().join("small/..");
    let refused = recipe::run(&recipe, folder.path(), &nameless, &settings, &mut Deaf).unwrap_err();
    assert!(refused.to_string().contains("no name"), "{refused}");
    // What else is in it would go with it.
    std::fs::create_dir(output.join("checkpoint")).unwrap();
    let refused = recipe::run(&recipe, folder.path(), &output, &settings, &mut Deaf).unwrap_err();
    assert!(refused.to_string().contains("or with more"), "{refused}");
    assert!(output.join("checkpoint").is_dir());
    let (outer, inner) = (dir.path().join("outer"), dir.path().join("outer/inner"));
    std::fs::create_dir_all(&inner).unwrap();
    for entry in std::fs::read_dir(folder.path()).unwrap().flatten() {
        std::fs::copy(entry.path(), inner.join(entry.file_name())).unwrap();
    }
    std::fs::copy(inner.join("config.json"), outer.join("config.json")).unwrap();
    let refused = recipe::run(&recipe, &inner, &outer, &settings, &mut Deaf).unwrap_err();
    assert!(refused.to_string().contains("has the model in it"), "{refused}");
    assert!(inner.join("config.json").is_file());
}

/// Every type that the step makes, alone and as a mixture, is one that the engine reads.
#[test]
fn quantised_folders_of_every_type_are_computed_with() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::read("llama");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    for dtype in TYPES {
        let (a, b) = (dir.path().join(dtype.as_str()), dir.path().join("b.gguf"));
        let text = format!("method = 'quantise', type = '{}'", dtype.as_str().to_ascii_lowercase());
        made(folder.path(), &a, &text);
        made(&file, &b, &text);
        let files = ModelFiles::open(&a).unwrap();
        let up = files.tensor("blk.0.ffn_up.weight").unwrap();
        assert_eq!(up.dtype, ModelFiles::open(&b).unwrap().tensor(&up.name).unwrap().dtype);
        assert!(up.dtype == dtype || up.dims[0] < dtype.block_elements(), "{text}: {:?}", up.dtype);
        alike(&a, &b, &text);
        std::fs::remove_file(&b).unwrap();
    }
}

/// Weights may come with a shape that nobody writes: no panic, and the tensor's name.
#[test]
fn factors_of_no_rank_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Case::read("llama").folder(TensorType::F32, 1);
    let target = dir.path().join("x");
    made(folder.path(), &target, "method = 'low-rank', rank = 32");
    let weights = target.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let thin = "model.layers.0.self_attn.q_proj_in.weight";
    let cut = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
        if name == thin {
            shape[0] = 0;
            data.clear();
        } else if name == thin.replace("_in", "") {
            shape[1] = 0;
            data.clear();
        }
        (name, (shape, data))
    };
    let all: Vec<_> = read.tensors().into_iter().map(cut).collect();
    let views = all.iter().map(|(name, (shape, data))| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
        (name, view.unwrap())
    });
    std::fs::write(&weights, safetensors::serialize(views, None).unwrap()).unwrap();
    let message = ModelFiles::open(&target).unwrap_err().to_string();
    assert!(message.contains(thin) && message.contains("rank 0"), "{message}");
}

/// Files of Gemma have no key for it: readers go by the model's size.
#[test]
fn attention_keeps_its_scale() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let case = Case::read("gemma2");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    // In the rhythm of windows: two, or what a list of three layers says.
    let [many, of_folder] = [2, 3].map(|rhythm| {
        let order: Vec<String> = (0..46).map(|i| (i % rhythm).to_string()).collect();
        format!("method = 'keep-layers', layers = [{}]", order.join(", "))
    });
    let fewer = "method = 'drop-heads', count = 1";
    // All heads are as wide as the model as long as there are all of them.
    made(&file, &at("many.gguf"), &many);
    made(&file, &at("fewer.gguf"), fewer);
    let before = names(dir.path());
    for (from, text) in [("many.gguf", fewer), ("fewer.gguf", &many)] {
        let refused = step(&at(from), &at("x"), text, &tokens(300)).unwrap_err().to_string();
        assert!(refused.contains("scale of attention") && refused.contains("gemma2"), "{refused}");
    }
    assert_eq!(names(dir.path()), before);
    // A folder states it.
    made(folder.path(), &at("fewer"), fewer);
    made(&at("fewer"), &at("many"), &of_folder);
    let scale = |path: &Path| ModelFiles::open(path).unwrap().config.features.attention_scale;
    assert_eq!(scale(&at("many")), scale(folder.path()));
}

/// What a folder cannot have is refused before anything is written.
#[test]
fn refusals_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let gemma = Case::read("gemma2").folder(TensorType::F32, 1);
    let layers = ModelFiles::open(gemma.path()).unwrap().config.layers;
    assert!(layers >= 2);
    let target = dir.path().join("x");
    for (text, named) in [
        ("method = 'keep-layers', layers = [1, 0]", "layer 1 would become layer 0"),
        ("method = 'storage'", "only GGUF"),
        ("method = 'keep-layers', layers = [99]", "no layer 99"),
    ] {
        let refused = step(gemma.path(), &target, text, &tokens(300)).unwrap_err().to_string();
        assert!(refused.contains(named), "{text}: {refused}");
        assert_eq!(names(dir.path()), Vec::<String>::new());
    }
}

/// The rows of queries or keys of a GGUF file as folders have them: there the halves of a head follow
/// each other, here their elements take turns.
fn halves(rows: &[f32], cols: usize, head_dim: usize) -> Vec<f32> {
    let order = (0..head_dim).step_by(2).chain((1..head_dim).step_by(2));
    let heads = rows.chunks(head_dim * cols);
    heads.flat_map(|h| order.clone().flat_map(|r| h[r * cols..][..cols].to_vec())).collect()
}

#[test]
fn heads_are_cut_whole_though_their_rows_lie_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::read("llama");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    let (a, b) = (dir.path().join("a"), dir.path().join("b.gguf"));
    for (from, to) in [(folder.path(), &a), (&*file, &b)] {
        made(from, to, "method = 'drop-heads', count = 1");
    }
    let (a, b) = (Source::open(&a).unwrap(), Source::open(&b).unwrap());
    let dim = b.config.head_dim as usize;
    let mut compared = 0;
    for tensor in &b.tensors {
        let part = tensor.name.split('.').nth(2).unwrap_or_default();
        if part == "attn_q" || part == "attn_k" {
            let rows = halves(&b.floats(tensor).unwrap(), tensor.dims[0] as usize, dim);
            assert!(a.floats(a.tensor(&tensor.name).unwrap()).unwrap() == rows, "{}", tensor.name);
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * b.config.layers);
}

#[test]
fn what_is_stated_of_weights_is_their_type() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Case::read("llama").folder(TensorType::BF16, 1);
    let path = folder.path().join("config.json");
    for (i, key) in ["dtype", "torch_dtype"].into_iter().enumerate() {
        let mut json = config(folder.path());
        json[key] = "bfloat16".into();
        std::fs::write(&path, json.to_string()).unwrap();
        let at = |name: &str| dir.path().join(format!("{i}-{name}"));
        made(folder.path(), &at("pruned"), "method = 'magnitude', sparsity = 0.5");
        assert_eq!(config(&at("pruned"))[key], "float32");
        made(folder.path(), &at("fewer"), "method = 'keep-layers', layers = [0]");
        assert_eq!(config(&at("fewer"))[key], "bfloat16");
    }
}

#[test]
fn lists_of_layers_are_cut_or_named() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Case::read("llama").folder(TensorType::F32, 1);
    let path = folder.path().join("config.json");
    let original = config(folder.path());
    let layers = original["num_hidden_layers"].as_u64().unwrap() as usize;
    let with = |key: &str, list: Vec<Value>| {
        let mut json = original.clone();
        json[key] = list.into();
        std::fs::write(&path, json.to_string()).unwrap();
    };
    let (target, text) = (dir.path().join("x"), "method = 'keep-layers', layers = [1]");
    with("layer_types", vec!["full_attention".into(); layers]);
    made(folder.path(), &target, text);
    assert_eq!(config(&target)["layer_types"], serde_json::json!(["full_attention"]));
    std::fs::remove_dir_all(&target).unwrap();
    for (key, list) in [
        ("layer_types", vec!["full_attention".into(); layers + 1]),
        ("dense_layers", vec![0.into(); layers + 3]),
    ] {
        with(key, list);
        let refused = step(folder.path(), &target, text, &[]).unwrap_err().to_string();
        assert!(refused.contains(&format!("'{key}'")), "{refused}");
        assert_eq!(names(dir.path()), Vec::<String>::new());
        std::fs::write(&path, original.to_string()).unwrap();
    }
}

#[test]
fn what_is_no_matrix_of_its_own_is_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let steps = ["drop-heads', count = 1", "drop-channels', fraction = 0.5", "width', hidden = 32"];
    let refused = |from: &Path, text: &str, said: &str| {
        let before = names(dir.path());
        let error = step(from, &at("x"), &format!("method = '{text}"), &tokens(300)).unwrap_err();
        assert!(error.to_string().contains(said), "{text}: {error}");
        assert_eq!(names(dir.path()), before);
    };
    let case = Case::read("llama");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    for (from, name) in [(folder.path(), "factored"), (&*file, "factored.gguf")] {
        made(from, &at(name), "method = 'low-rank', rank = 32");
        for text in steps {
            refused(&at(name), text, "is a factor");
        }
    }
    let case = Case::read("phi3");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    for from in [folder.path(), &*file] {
        for text in &steps[..2] {
            refused(from, text, "holds several matrices");
        }
    }
}

/// A thin matrix that belongs to none would be ignored.
#[test]
fn stray_factors_have_no_place() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Case::read("llama").folder(TensorType::F32, 1);
    let target = dir.path().join("x");
    made(folder.path(), &target, "method = 'low-rank', rank = 32");
    let weights = target.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    let at = bytes.windows(9).position(|w| w == b"q_proj_in").unwrap();
    let mut stray = bytes;
    stray[at] = b'k';
    std::fs::write(&weights, stray).unwrap();
    let message = ModelFiles::open(&target).unwrap_err().to_string();
    assert!(message.contains("k_proj_in") && message.contains("no place"), "{message}");
}

/// Biases go with the rows of their matrices, and what other programs refuse is told.
#[test]
fn biases_are_cut_with_their_heads() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::read("qwen2");
    let (folder, file) = (case.folder(TensorType::F32, 1), gguf::write(&case, dir.path()));
    let (a, b) = (dir.path().join("a"), dir.path().join("b.gguf"));
    let text = "method = 'drop-heads', count = 1";
    let (of_folder, of_file) = (made(folder.path(), &a, text), made(&file, &b, text));
    let told = |report: &StepReport| report.notes.iter().any(|n| n.contains("llama.cpp refuses"));
    assert!(told(&of_file) && !told(&of_folder), "{:?}", of_file.notes);
    let (old, new) = (Source::open(&file).unwrap(), Source::open(&b).unwrap());
    for part in ["q", "k", "v"] {
        let [bias, weight] = ["bias", "weight"]
            .map(|kind| new.tensor(&format!("blk.0.attn_{part}.{kind}")).unwrap());
        assert_eq!(bias.dims, [weight.dims[1]]);
        let before = old.floats(old.tensor(&bias.name).unwrap()).unwrap();
        let after = new.floats(bias).unwrap();
        // Whole heads of the old one.
        let head = new.config.head_dim as usize;
        for some in after.chunks(head) {
            assert!(before.chunks(head).any(|one| one == some), "{}", bias.name);
        }
        assert!(after.len() < before.len());
    }
}
