//! Our quantisers beside ggml's own on fixed weights (`testdata/ggml`): the error is no more than 2 %
//! larger, for every type, with and without importance.

use std::path::Path;

use millrace_compress::quant::encode_row;
use millrace_engine::cpu::dequantise_row;
use millrace_shared::model::TensorType;

const COLUMNS: usize = 512;
const LIMIT: f64 = 1.02;

fn file(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/ggml").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(name: &str) -> Vec<f32> {
    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    file(name).chunks_exact(4).map(number).collect()
}

/// The squared error of a row in blocks, weighted where columns have weights.
fn error(dtype: TensorType, row: &[f32], blocks: &[u8], weights: Option<&[f32]>) -> f64 {
    let mut back = vec![0f32; row.len()];
    assert!(dequantise_row(dtype, blocks, &mut back));
    let weight = |j: usize| weights.map_or(1.0, |w| f64::from(w[j]));
    (0..row.len()).map(|j| weight(j) * f64::from(row[j] - back[j]).powi(2)).sum()
}

#[test]
fn errors_are_those_of_ggml() {
    let (weights, importance) = (floats("weights.f32"), floats("importance.f32"));
    let rows: Vec<&[f32]> = weights.chunks_exact(COLUMNS).collect();
    assert_eq!((rows.len(), importance.len()), (12, COLUMNS));
    let types = [
        ("q4_0", TensorType::Q4_0),
        ("q4_1", TensorType::Q4_1),
        ("q5_0", TensorType::Q5_0),
        ("q8_0", TensorType::Q8_0),
        ("q4_k", TensorType::Q4_K),
        ("q6_k", TensorType::Q6_K),
    ];
    for ((name, dtype), important) in types.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        if important && dtype == TensorType::Q8_0 {
            continue;
        }
        let importance = important.then_some(&importance[..]);
        let suffix = if important { ".importance" } else { "" };
        let theirs = file(&format!("{name}{suffix}.bin"));
        let bytes = theirs.len() / rows.len();
        let (mut own, mut reference, mut alike) = (0f64, 0f64, 0);
        for (row, theirs) in rows.iter().zip(theirs.chunks_exact(bytes)) {
            let mut out = vec![0u8; bytes];
            encode_row(dtype, row, importance, &mut out).expect("weights are finite");
            // Of each row, as rows with large weights would drown the others.
            let square: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
            own += error(dtype, row, &out, importance) / square;
            reference += error(dtype, row, theirs, importance) / square;
            let block = dtype.block_bytes() as usize;
            alike += out.chunks(block).zip(theirs.chunks(block)).filter(|(a, b)| a == b).count();
        }
        let ratio = (own / reference).sqrt();
        let all = theirs.len() / dtype.block_bytes() as usize;
        eprintln!("{name}{suffix}: error {ratio:.4} times ggml's, {alike} of {all} blocks alike");
        assert!(ratio < LIMIT, "{name}{suffix}: the error is {ratio:.4} times that of ggml");
    }
}
