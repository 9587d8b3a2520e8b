//! What the tests of tokenizers share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_coordinator::text::{Detokenizer, Tokenizer};
use serde_json::Value;

/// A file or folder of `testdata/tokenizers`.
pub(crate) fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/testdata/tokenizers").join(name)
}

pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn stream(mut detokenizer: Detokenizer, ids: &[u32]) -> String {
    let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    text.push_str(&detokenizer.finish());
    text
}

/// A stream of tokens gives the text of the whole.
pub(crate) fn check_streaming(tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
    let new = || Detokenizer::new(Arc::clone(tokenizer));
    assert_eq!(stream(new(), ids), tokenizer.decode(ids, true), "{ids:?}");
    assert_eq!(stream(new().with_special(true), ids), tokenizer.decode(ids, false), "{ids:?}");
    // What goes on with a text keeps the space at its beginning.
    let bytes = |id: u32| if tokenizer.is_special(id) { b"" } else { tokenizer.token_bytes(id) };
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| bytes(id)).copied().collect();
    assert_eq!(stream(new().continuing(), ids), String::from_utf8_lossy(&bytes), "{ids:?}");
}

/// [`check_streaming`] for random tokens, which models never say so.
pub(crate) fn check_random_streams(tokenizer: &Arc<Tokenizer>) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    };
    for _ in 0..500 {
        let ids: Vec<u32> = (0..random(12))
            // Half of them from the low ids, where single bytes are.
            .map(|_| {
                let half = if random(2) == 0 { 300 } else { u64::MAX };
                random(half.min(u64::from(tokenizer.vocab_size()) + 2)) as u32
            })
            .collect();
        check_streaming(tokenizer, &ids);
    }
}
