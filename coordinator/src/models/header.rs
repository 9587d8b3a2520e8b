//! The directory of a model file without its weights: of a model that is not on this machine only the
//! first bytes are fetched.
//!
//! What comes from a hub is not checked against a hash, which only the whole file has: it serves for
//! planning, nothing is computed from it.

use std::io::{BufReader, Read as _};
use std::time::Duration;

use millrace_shared::model::ModelFiles;
use millrace_shared::model::gguf::Gguf;

use super::catalogue::{CATALOGUE, CatalogueEntry, find};
use super::fetch::Source;
use super::resolve::{existing, is_complete, target_of};
use super::{ModelError, Progress, Settings, resolve};

/// The most that is fetched: the largest vocabularies take some 10 MB.
const MOST_BYTES: u64 = 64 << 20;
/// Time for all of it.
const DEADLINE: Duration = Duration::from_secs(60);

/// The directory of a model: of a file, of the cache, else from the hub. Where the hub does not
/// answer, the model is fetched as a whole. Blocks.
///
/// # Errors
/// As [`resolve()`], and if it is no sound model file.
pub fn header(model: &str, progress: &mut dyn Progress) -> Result<ModelFiles, ModelError> {
    if let Some(path) = existing(model)? {
        return Ok(ModelFiles::open(&path)?);
    }
    let settings = Settings::from_env()?;
    let entry = find(CATALOGUE, model).map_err(ModelError::Unknown)?;
    let path = target_of(entry, &settings);
    if is_complete(&path, entry) {
        return Ok(ModelFiles::open(&path)?);
    }
    match from_hub(entry, &settings) {
        Ok(gguf) => Ok(ModelFiles::of_gguf(gguf, &path)?),
        Err(problem) => {
            tracing::debug!(model, %problem, "the header alone cannot be had");
            Ok(ModelFiles::open(&resolve(model, progress)?)?)
        }
    }
}

fn from_hub(entry: &CatalogueEntry, settings: &Settings) -> Result<Gguf, String> {
    let hub = entry.hub.filter(|_| settings.source.is_none_or(|s| s == Source::Hub));
    let hub = hub.ok_or("it has no such source")?;
    let url = format!("{}/{}/resolve/{}/{}", settings.hub_url, hub.repo, hub.revision, hub.file);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(5)))
        .timeout_resolve(Some(Duration::from_secs(5)))
        .timeout_global(Some(DEADLINE))
        .user_agent(concat!("millrace/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let range = format!("bytes=0-{}", MOST_BYTES.min(entry.bytes) - 1);
    // A server that knows no ranges sends the whole file, of which the rest is not read.
    let response = agent.get(&url).header("range", range).call().map_err(|e| e.to_string())?;
    let body = response.into_body().into_reader().take(MOST_BYTES);
    Gguf::read(BufReader::with_capacity(1 << 16, body), entry.bytes).map_err(|e| e.to_string())
}
