//! Tells programs with the torch engine where libtorch lies: where it was when they were built, or
//! beside them in `libtorch/lib`. Used by every package that links it; does nothing without it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Of torch-sys, and of the torch engine, which hands it on.
    let variables = ["DEP_TCH_LIBTORCH_LIB", "DEP_MILLRACE_TORCH_LIBTORCH_LIB"];
    let Some(folder) = variables.iter().find_map(|name| std::env::var(name).ok()) else {
        return;
    };
    for place in [folder.as_str(), "$ORIGIN/libtorch/lib"] {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{place}");
    }
    if std::env::var("CARGO_PKG_NAME").is_ok_and(|name| name == "millrace-torch") {
        println!("cargo::metadata=libtorch_lib={folder}");
    }
}
