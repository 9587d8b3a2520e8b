//! What can be done to a model: the steps of a recipe, as they are written in TOML.
//!
//! A step is a table with `method` and its settings; a key that a method does not know is an error.

use millrace_shared::model::{SparseForm, TensorType};
use serde::{Deserialize, Serialize};

use crate::CompressError;
use crate::lowrank::{GRAIN, grained};
use crate::prune::Pattern;
use crate::quant::TYPES;

/// Integers that share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Per {
    /// Those of an output.
    #[default]
    Row,
    /// All of a matrix.
    Tensor,
}

/// How files keep matrices of layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Each in the one that takes the fewest bytes.
    #[default]
    Auto,
    /// With their zeros.
    Dense,
    /// A column for each value.
    Csr,
    /// A bit for each weight.
    Bitmask,
    /// Tiles of 16 rows that are not all zeros.
    Tiles,
}

impl Form {
    /// The forms without zeros that may be.
    pub(crate) fn sparse(self) -> &'static [SparseForm] {
        match self {
            Self::Auto => &SparseForm::ALL,
            Self::Dense => &[],
            Self::Csr => &[SparseForm::Csr],
            Self::Bitmask => &[SparseForm::Bitmask],
            Self::Tiles => &[SparseForm::Tiles],
        }
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// Blocks of GGUF: `type` of layers' matrices, `output` of embedding and output matrix.
    Quantise {
        /// A type's name.
        #[serde(rename = "type")]
        to: String,
        /// Of the embedding and the output matrix; q8_0 where nothing is said.
        output: Option<String>,
        /// Errors of columns weigh as their inputs do in the calibration text.
        #[serde(default)]
        importance: bool,
        /// Later columns make up for errors of earlier ones.
        #[serde(default)]
        gptq: bool,
    },
    /// Block types chosen for each matrix, so that all tensors take at most these bytes.
    Mixed {
        /// The budget.
        bytes: u64,
    },
    /// Eight-bit integers.
    Int8 {
        /// What shares a scale.
        #[serde(default)]
        per: Per,
        /// With a minimum.
        #[serde(default)]
        affine: bool,
    },
    /// `round(w 2^fraction_bits)` in integers of `bits` bits.
    FixedPoint {
        /// Bits behind the point.
        fraction_bits: i32,
        /// Bits in all.
        bits: u32,
        /// Modulo `2^bits`; else saturating.
        #[serde(default)]
        wrap: bool,
        /// Modulo this.
        modulo: Option<u32>,
    },
    /// Signs, and a magnitude.
    Binary {
        /// What shares a magnitude.
        #[serde(default)]
        per: Per,
    },
    /// Small weights become zero: a part of them, or those at or below a threshold.
    Magnitude {
        /// Part that goes.
        sparsity: Option<f64>,
        /// Greatest magnitude that goes.
        threshold: Option<f32>,
        /// What competes.
        #[serde(default)]
        pattern: Pattern,
        /// All matrices compete with each other.
        #[serde(default)]
        global: bool,
    },
    /// `w I(w > theta)`.
    SignedThreshold {
        /// Threshold.
        theta: f32,
    },
    /// Weights into a range.
    Clip {
        /// Least.
        min: f32,
        /// Greatest.
        max: f32,
    },
    /// A random part of the weights becomes zero.
    Random {
        /// Part that goes.
        sparsity: f64,
        /// Of the generator.
        #[serde(default)]
        seed: u64,
        /// What competes.
        #[serde(default)]
        pattern: Pattern,
    },
    /// Weights that contribute little to outputs become zero.
    Wanda {
        /// Part that goes.
        sparsity: f64,
        /// What competes; a row where nothing is said.
        #[serde(default = "row")]
        pattern: Pattern,
    },
    /// As it, the rest making up for what went.
    Sparsegpt {
        /// Part that goes.
        sparsity: f64,
        /// `row` or `2:4`.
        #[serde(default = "row")]
        pattern: Pattern,
    },
    /// Two thin matrices for each.
    LowRank {
        /// Of all matrices: a multiple of 32.
        rank: Option<u32>,
        /// Part of the energy that stays.
        energy: Option<f64>,
        /// Part of the weights that stays.
        size: Option<f64>,
        /// Budget of all tensors, ranks being chosen so that least is lost.
        bytes: Option<u64>,
        /// For the inputs of the calibration text.
        #[serde(default)]
        aware: bool,
    },
    /// Layers of least influence go.
    DropLayers {
        /// How many.
        count: u32,
    },
    /// Those layers stay, in that order.
    KeepLayers {
        /// Numbers.
        layers: Vec<u32>,
    },
    /// Pairs of neighbours of least influence become their mean.
    MergeLayers {
        /// How many pairs.
        count: u32,
    },
    /// In each layer, KV heads of least influence go with their query heads.
    DropHeads {
        /// KV heads of each layer.
        count: u32,
    },
    /// In each layer, inner channels of the feed-forward part of least influence go.
    DropChannels {
        /// Part of them.
        fraction: f64,
    },
    /// The most active elements of the residual stream stay.
    Width {
        /// How many.
        hidden: u32,
    },
    /// Zeros are left out of the file.
    Storage {
        /// How.
        #[serde(default)]
        form: Form,
    },
}

fn row() -> Pattern {
    Pattern::Row
}

/// What a step must know of inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// Squares.
    Squares,
    /// Products.
    Products,
}

impl Step {
    /// From TOML: `method = "wanda", sparsity = 0.5`, with or without braces.
    ///
    /// # Errors
    /// Names the key that is not known, or the value that cannot be.
    pub fn parse(text: &str) -> Result<Self, CompressError> {
        #[derive(Deserialize)]
        struct One {
            step: Step,
        }
        let inner = text.trim();
        let table =
            if inner.starts_with('{') { inner.to_owned() } else { format!("{{ {inner} }}") };
        let one: One = toml::from_str(&format!("step = {table}"))
            .map_err(|e| CompressError::Settings(format!("step '{text}': {}", e.message())))?;
        one.step.check()?;
        Ok(one.step)
    }

    /// As one line of TOML.
    pub fn describe(&self) -> String {
        let Ok(toml::Value::Table(table)) = toml::Value::try_from(self) else {
            return format!("{self:?}");
        };
        let mut parts: Vec<String> = table.iter().map(|(k, v)| format!("{k} = {v}")).collect();
        // The method first.
        parts.sort_by_key(|p| !p.starts_with("method"));
        parts.join(", ")
    }

    /// What it must know of inputs.
    pub fn needs(&self) -> Needs {
        match self {
            Self::Quantise { gptq: true, .. } | Self::Sparsegpt { .. } => Needs::Products,
            Self::LowRank { aware: true, .. } => Needs::Products,
            Self::Quantise { importance: true, .. } | Self::Wanda { .. } | Self::Mixed { .. } => {
                Needs::Squares
            }
            Self::DropLayers { .. }
            | Self::MergeLayers { .. }
            | Self::DropHeads { .. }
            | Self::DropChannels { .. }
            | Self::Width { .. } => Needs::Squares,
            _ => Needs::Nothing,
        }
    }

    /// How often it goes through all tensors: what it tells of its progress are the bytes of all times.
    pub fn passes(&self) -> u64 {
        match self {
            Self::KeepLayers { .. } | Self::LowRank { rank: Some(_), .. } => 1,
            Self::LowRank { size: Some(_), .. } => 1,
            Self::Mixed { .. } | Self::Storage { .. } | Self::Magnitude { global: true, .. } => 2,
            structural if structural.is_structural() => 2,
            _ => 1,
        }
    }

    /// Whether zeros are what it is for.
    pub fn prunes(&self) -> bool {
        matches!(
            self,
            Self::Magnitude { .. }
                | Self::SignedThreshold { .. }
                | Self::Random { .. }
                | Self::Wanda { .. }
                | Self::Sparsegpt { .. }
        )
    }

    /// Whether it changes shapes.
    pub fn is_structural(&self) -> bool {
        matches!(
            self,
            Self::LowRank { .. }
                | Self::DropLayers { .. }
                | Self::KeepLayers { .. }
                | Self::MergeLayers { .. }
                | Self::DropHeads { .. }
                | Self::DropChannels { .. }
                | Self::Width { .. }
        )
    }

    /// Checks settings that need no model.
    ///
    /// # Errors
    /// Names the first that cannot be.
    pub fn check(&self) -> Result<(), CompressError> {
        let bad = |what: String| Err(CompressError::Settings(what));
        let part = |name: &str, x: f64| match x {
            x if (0.0..1.0).contains(&x) => Ok(()),
            _ => bad(format!("{name} = {x} is no part: it goes from 0 to less than 1")),
        };
        let pruned = |sparsity: f64, pattern: Pattern| match pattern {
            Pattern::TwoOfFour if sparsity != 0.5 => {
                bad(format!("two of four are half: 2:4 goes with sparsity = 0.5, not {sparsity}"))
            }
            _ => part("sparsity", sparsity),
        };
        match self {
            Self::Quantise { to, output, gptq, importance } => {
                let to = parse_type(to)?;
                output.as_deref().map(parse_type).transpose()?;
                let float = to.block_elements() == 1;
                if float && (*gptq || *importance) {
                    return bad(format!(
                        "{} is not rounded to blocks: leave gptq and importance out",
                        to.as_str()
                    ));
                }
                if *gptq && *importance {
                    return bad("gptq weighs errors by all products of inputs already: leave importance out".to_owned());
                }
                Ok(())
            }
            Self::FixedPoint { fraction_bits, bits, wrap, modulo } => {
                if !(2..=24).contains(bits) || !(-24..=24).contains(fraction_bits) {
                    return bad("bits go from 2 to 24, fraction_bits from -24 to 24".to_owned());
                }
                if *wrap && modulo.is_some() {
                    return bad("wrap is modulo 2^bits: leave it or modulo out".to_owned());
                }
                if let Some(q) = modulo.filter(|q| !(2..=1 << bits).contains(q)) {
                    return bad(format!("modulo = {q}: {bits} bits hold from 2 to {}", 1 << bits));
                }
                Ok(())
            }
            Self::Magnitude { sparsity, threshold, pattern, global } => match (sparsity, threshold)
            {
                (Some(_), Some(_)) | (None, None) => {
                    bad("magnitude takes a sparsity or a threshold".to_owned())
                }
                (Some(s), None) => {
                    if *global && *pattern != Pattern::Tensor {
                        return bad("global = true goes with no pattern".to_owned());
                    }
                    pruned(*s, *pattern)
                }
                (None, Some(t)) if !t.is_finite() || *t < 0.0 => {
                    bad(format!("threshold = {t} is below 0"))
                }
                (None, Some(_)) if *global || *pattern != Pattern::Tensor => {
                    bad("a threshold is for each weight by itself: leave pattern and global out"
                        .to_owned())
                }
                _ => Ok(()),
            },
            Self::SignedThreshold { theta } if !theta.is_finite() => {
                bad("theta is a number".to_owned())
            }
            Self::Clip { min, max } if !min.is_finite() || !max.is_finite() || min >= max => {
                bad(format!("clip needs min below max, not {min} and {max}"))
            }
            Self::Random { sparsity, pattern, .. } | Self::Wanda { sparsity, pattern } => {
                pruned(*sparsity, *pattern)
            }
            Self::Sparsegpt { sparsity, pattern } => match pattern {
                Pattern::Row | Pattern::TwoOfFour => pruned(*sparsity, *pattern),
                _ => bad("sparsegpt prunes rows, or 2:4".to_owned()),
            },
            Self::LowRank { rank, energy, size, bytes, .. } => match (rank, energy, size, bytes) {
                (Some(r), None, None, None) if *r > 0 && r.is_multiple_of(GRAIN as u32) => Ok(()),
                (Some(r), None, None, None) => bad(format!(
                    "rank = {r}: kernels compute with multiples of {GRAIN}: use {}",
                    grained(*r as usize)
                )),
                (None, Some(part), None, None) | (None, None, Some(part), None)
                    if *part > 0.0 && *part <= 1.0 =>
                {
                    Ok(())
                }
                (None, Some(_), None, None) | (None, None, Some(_), None) => {
                    bad("a part of energy or size lies above 0, up to 1".to_owned())
                }
                (None, None, None, Some(_)) => Ok(()),
                _ => bad("low-rank takes one of rank, energy, size and bytes".to_owned()),
            },
            Self::DropChannels { fraction } => part("fraction", *fraction),
            Self::KeepLayers { layers } if layers.is_empty() => {
                bad("a model has one layer at least".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// A type of [`TYPES`] by its name, in any case.
///
/// # Errors
/// Names what there is.
pub fn parse_type(name: &str) -> Result<TensorType, CompressError> {
    let found = TYPES.iter().find(|t| t.as_str().eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| {
        let names: Vec<String> = TYPES.iter().map(|t| t.as_str().to_ascii_lowercase()).collect();
        CompressError::Settings(format!("'{name}' is no type to store: use {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_and_written() {
        let step = Step::parse("method = \"wanda\", sparsity = 0.5").unwrap();
        assert_eq!(step, Step::Wanda { sparsity: 0.5, pattern: Pattern::Row });
        assert_eq!(Step::parse(&step.describe()).unwrap(), step);
        let step = Step::parse("{ method = \"quantise\", type = \"q4_K\", gptq = true }").unwrap();
        assert_eq!(step.needs(), Needs::Products);
        assert_eq!(Step::parse(&step.describe()).unwrap(), step);
        assert_eq!(Step::parse("method = \"binary\"").unwrap(), Step::Binary { per: Per::Row });
    }

    #[test]
    fn what_cannot_be_is_named() {
        let cases = [
            ("method = \"wanda\", sparsty = 0.5", "sparsty"),
            ("method = \"wanda\", sparsity = 1.5", "sparsity = 1.5"),
            ("method = \"wonder\"", "wonder"),
            ("method = \"wanda\", sparsity = 0.7, pattern = \"2:4\"", "sparsity = 0.5, not 0.7"),
            ("method = \"quantise\", type = \"q3_z\"", "q3_z"),
            ("method = \"magnitude\"", "threshold"),
            ("method = \"clip\", min = 1.0, max = 0.0", "min below max"),
            ("method = \"low-rank\", size = 2.0", "up to 1"),
            ("method = \"low-rank\", rank = 0", "use 32"),
            ("method = \"low-rank\", rank = 100", "use 96"),
            ("method = \"low-rank\", rank = 64, size = 0.5", "one of rank"),
            ("method = \"low-rank\"", "one of rank"),
            ("method = \"fixed-point\", fraction_bits = 4, bits = 99", "bits go"),
            ("method = \"fixed-point\", fraction_bits = 4, bits = 8, modulo = 257", "2 to 256"),
            (
                "method = \"fixed-point\", fraction_bits = 4, bits = 8, modulo = 9, wrap = true",
                "out",
            ),
            ("method = \"binary\", scale = 2", "scale"),
            ("method = \"storage\", form = \"coo\"", "coo"),
            ("sparsity = 0.5", "method"),
        ];
        for (text, named) in cases {
            let error = Step::parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
