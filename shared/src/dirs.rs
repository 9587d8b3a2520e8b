//! Where files live, by the XDG convention. The environment is handed in.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::names;

/// Looks up an environment variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn xdg(env: Lookup<'_>, own: &str, xdg: &str, fallback: &str) -> Option<PathBuf> {
    let set = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // The convention says that a relative XDG folder is to be ignored.
    set(own)
        .or_else(|| set(xdg).filter(|p| p.is_absolute()).map(|p| p.join("millrace")))
        .or_else(|| set("HOME").map(|p| p.join(fallback).join("millrace")))
}

/// Fetched models and tensors: `$MILLRACE_CACHE`, else the XDG cache folder. `None` without a home.
pub fn cache(env: Lookup<'_>) -> Option<PathBuf> {
    xdg(env, names::env::CACHE, "XDG_CACHE_HOME", ".cache")
}

/// State of coordinators, nodes and clients: `$MILLRACE_DIR`, else the XDG data folder. `None`
/// without a home.
pub fn data(env: Lookup<'_>) -> Option<PathBuf> {
    xdg(env, names::env::DIR, "XDG_DATA_HOME", ".local/share")
}

fn set(env: Lookup<'_>, name: &str) -> Option<PathBuf> {
    env(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// The folder of Hugging Face's own tools: `$HF_HOME`, else `huggingface` in the XDG cache folder.
fn hugging_face(env: Lookup<'_>) -> Option<PathBuf> {
    let cache = || set(env, "XDG_CACHE_HOME").or_else(|| Some(set(env, "HOME")?.join(".cache")));
    set(env, names::env::HF_HOME).or_else(|| Some(cache()?.join("huggingface")))
}

/// Where these tools keep models: `$HF_HUB_CACHE`, else `hub` in their folder.
pub fn hugging_face_hub(env: Lookup<'_>) -> Option<PathBuf> {
    set(env, names::env::HF_HUB_CACHE).or_else(|| Some(hugging_face(env)?.join("hub")))
}

/// Where they keep the token: `$HF_TOKEN_PATH`, else `token` in their folder.
pub fn hugging_face_token(env: Lookup<'_>) -> Option<PathBuf> {
    set(env, names::env::HF_TOKEN_PATH).or_else(|| Some(hugging_face(env)?.join("token")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence() {
        let home = |name: &str| (name == "HOME").then(|| OsString::from("/h"));
        assert_eq!(cache(&home), Some("/h/.cache/millrace".into()));
        assert_eq!(data(&home), Some("/h/.local/share/millrace".into()));
        let all = |name: &str| match name {
            "MILLRACE_CACHE" => Some(OsString::from("/own")),
            "XDG_DATA_HOME" => Some(OsString::from("/data")),
            "HOME" => Some(OsString::from("/h")),
            _ => None,
        };
        assert_eq!(cache(&all), Some("/own".into()));
        assert_eq!(data(&all), Some("/data/millrace".into()));
        let relative = |name: &str| match name {
            "XDG_CACHE_HOME" => Some(OsString::from("relative")),
            "HOME" => Some(OsString::from("/h")),
            _ => None,
        };
        assert_eq!(cache(&relative), Some("/h/.cache/millrace".into()));
        assert_eq!(cache(&|_| None), None);
    }

    #[test]
    fn folders_of_hugging_face() {
        let home = |name: &str| (name == "HOME").then(|| OsString::from("/h"));
        assert_eq!(hugging_face_hub(&home), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(hugging_face_token(&home), Some("/h/.cache/huggingface/token".into()));
        let own = |name: &str| match name {
            "HF_HOME" => Some(OsString::from("/f")),
            "HF_HUB_CACHE" => Some(OsString::from("/g")),
            _ => None,
        };
        assert_eq!(hugging_face_hub(&own), Some("/g".into()));
        assert_eq!(hugging_face_token(&own), Some("/f/token".into()));
        assert_eq!(hugging_face_hub(&|_| None), None);
    }
}
