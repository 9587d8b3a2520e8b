//! What a file that is no GGUF looks like, so that the error can say it.

/// Describes the first bytes of a file without GGUF's magic.
pub(super) fn looks_like(head: &[u8]) -> &'static str {
    let text = head.trim_ascii_start().to_ascii_lowercase();
    if head.is_empty() {
        "an empty file"
    } else if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        "a zip archive (a Python wheel or a PyTorch checkpoint is one); unpack or convert it first"
    } else if matches!(&head[..head.len().min(4)], b"tjgg" | b"lmgg" | b"fmgg" | b"algg") {
        "a ggml file from before GGUF; convert the original model again"
    } else if head.len() > 8 && head[8] == b'{' && head[5..8] == [0, 0, 0] {
        "a safetensors file; convert it to GGUF first"
    } else if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") {
        "an HTML page (the download was probably an error or login page)"
    } else if text.starts_with(b"version https://git-lfs") {
        "a Git LFS pointer; fetch the file itself (git lfs pull)"
    } else if head.starts_with(&[0x1f, 0x8b]) {
        "a gzip archive; unpack it first"
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "a zstd archive; unpack it first"
    } else if head.starts_with(b"\x80\x02") || head.starts_with(b"\x80\x04") {
        "a Python pickle; convert it to GGUF first"
    } else if head.starts_with(b"\x7fELF") {
        "a program"
    } else if text.starts_with(b"{") || text.starts_with(b"[") {
        "JSON"
    } else if text.starts_with(b"<") {
        "XML or HTML"
    } else if head.iter().all(|&b| b == 0) {
        "zeros (a download that was never filled in)"
    } else {
        "something unknown"
    }
}
