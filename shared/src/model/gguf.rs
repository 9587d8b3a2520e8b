//! placeholder: GGUF directory reader
