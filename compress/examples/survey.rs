//! Every method on a real model, from lists of token ids: the table without a tokenizer.
//!
//! `cargo run -p millrace-compress --example survey -- MODEL CALIBRATION.json TEXT.json [WORD] [OUT.html]`

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use millrace_compress::Settings;
use millrace_compress::compare::{Entry, Terms, page};
use millrace_compress::survey::{survey, variants};
use millrace_shared::model::{Dtype, TensorType};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, calibration, text, rest @ ..] = args.as_slice() else {
        println!("usage: survey MODEL CALIBRATION.json TEXT.json [WORD] [OUT.html]");
        return;
    };
    let ids =
        |path: &str| -> Vec<u32> { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let (calibration, text) = (ids(calibration), ids(text));
    let chosen = variants(rest.first().map(String::as_str)).unwrap();
    let store = TensorType::F16;
    let settings =
        Settings { calibration: &calibration, known: None, store, threads: 2, overwrite: true };
    let terms = Terms { window: 512, threads: 2, kv_dtype: Dtype::F16 };
    let mut start = Instant::now();
    let mut each = |e: &Entry, _: usize| {
        let seconds = start.elapsed().as_secs_f64();
        start = Instant::now();
        println!("{seconds:.0} s {}", serde_json::to_string(e).unwrap());
    };
    let all =
        survey(Path::new(model), &chosen, &text, &settings, (terms, None), &mut each).unwrap();
    if let Some(path) = rest.get(1) {
        std::fs::write(path, page("Methods compared", &all, &[])).unwrap();
    }
}
