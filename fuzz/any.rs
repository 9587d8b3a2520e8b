//! Coverage-guided inputs for one of the harness's fuzz targets, the one that `MILLRACE_FUZZ_TARGET`
//! names. What covers the rest of an input is mended after most mutations, as in the harness's own
//! runs. The target's sound inputs are written to `MILLRACE_FUZZ_SEEDS`, from where libFuzzer reads
//! them. `.ci/fuzz` does all of it.
#![no_main]

use std::cell::OnceCell;
use std::path::Path;

use harness::fuzz::{Target, targets};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

thread_local! {
    static TARGET: OnceCell<Target> = const { OnceCell::new() };
}

fn choose() -> Target {
    let named = std::env::var("MILLRACE_FUZZ_TARGET").unwrap_or_default();
    let all = targets();
    let names: Vec<&str> = all.iter().map(|t| t.name).collect();
    let names = names.join(", ");
    let chosen = all.into_iter().find(|t| t.name == named);
    let chosen = chosen.unwrap_or_else(|| panic!("MILLRACE_FUZZ_TARGET names one of: {names}"));
    if let Ok(folder) = std::env::var("MILLRACE_FUZZ_SEEDS") {
        for (i, bytes) in chosen.corpus.iter().enumerate() {
            let file = Path::new(&folder).join(format!("sound-{i}"));
            std::fs::write(&file, bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }
    chosen
}

fn with<R>(f: impl FnOnce(&Target) -> R) -> R {
    TARGET.with(|target| f(target.get_or_init(choose)))
}

fuzz_target!(
    init: with(|_| ()),
    |data: &[u8]| {
        with(|target| (target.read)(data));
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    let mend = with(|target| target.mend).filter(|_| !seed.is_multiple_of(4));
    let Some(mend) = mend else { return size };
    let mut bytes = data[..size].to_vec();
    mend(&mut bytes);
    let mended = bytes.len().min(max_size);
    data[..mended].copy_from_slice(&bytes[..mended]);
    mended
});
