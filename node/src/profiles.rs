//! Measurements of this machine, kept in the cache folder: what was measured for the same model, the
//! same share of the same machine and the same engine is not measured again for a week.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use millrace_shared::wire::control::{PROFILE_CONTEXT, ProfileSpec, StageProfile};

/// Machines change: other cooling, other neighbours, other kernels.
const KEEP: Duration = Duration::from_hours(7 * 24);

/// One measurement, known or not.
#[derive(Clone, Debug)]
pub(crate) struct KnownProfile(PathBuf);

impl KnownProfile {
    /// Of `spec` by `threads` threads; `machine` names the machine and the engine.
    pub(crate) fn new(cache: &Path, spec: &ProfileSpec, threads: usize, machine: &str) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let key = format!("{version}\n{machine}\n{threads}\n{PROFILE_CONTEXT}\n{spec:?}");
        let name = blake3::hash(key.as_bytes()).to_hex();
        Self(cache.join("profiles").join(&name[..32]))
    }

    /// What was measured, if that is not long ago.
    pub(crate) fn get(&self) -> Option<StageProfile> {
        let at = std::fs::metadata(&self.0).ok()?.modified().ok()?;
        if SystemTime::now().duration_since(at).unwrap_or_default() > KEEP {
            return None;
        }
        let text = std::fs::read_to_string(&self.0).ok()?;
        let mut words = text.split_whitespace().map(str::parse::<f64>);
        let mut profile = StageProfile::default();
        for seconds in profile.layer_seconds.iter_mut().chain(&mut profile.head_seconds) {
            *seconds = words.next()?.ok().filter(|s| s.is_finite() && *s > 0.0)?;
        }
        words.next().is_none().then_some(profile)
    }

    /// Corrects a measurement that is kept: it is as old as it was.
    pub(crate) fn refresh(&self, profile: &StageProfile) {
        let measured = std::fs::metadata(&self.0).and_then(|m| m.modified());
        self.put(profile);
        let aged = measured.and_then(|at| std::fs::File::open(&self.0)?.set_modified(at));
        if let Err(error) = aged {
            tracing::debug!(path = %self.0.display(), %error, "the measurement looks new");
        }
    }

    /// Keeps a measurement; where that is not possible, the next start measures again.
    pub(crate) fn put(&self, profile: &StageProfile) {
        if let Err(error) = self.write(profile) {
            tracing::debug!(path = %self.0.display(), %error, "the measurement is not kept");
        }
    }

    fn write(&self, profile: &StageProfile) -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.0.parent().unwrap_or(&self.0))?;
        let part = self.0.with_extension(format!("{}.part", uuid::Uuid::now_v7().simple()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let seconds = profile.layer_seconds.iter().chain(&profile.head_seconds);
        let text = seconds.map(|s| format!("{s:e}\n")).collect::<String>();
        let written =
            file.write_all(text.as_bytes()).and_then(|()| std::fs::rename(&part, &self.0));
        if written.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_kept_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let known = KnownProfile(dir.path().join("profiles/x"));
        assert_eq!(known.get(), None);
        let profile = StageProfile {
            layer_seconds: [1.25e-4, 2e-4, 5e-4, 0.002],
            head_seconds: [0.001, 0.002, 0.004, 0.016],
        };
        known.put(&profile);
        assert_eq!(known.get(), Some(profile));
        let yesterday = SystemTime::now() - Duration::from_hours(24);
        std::fs::File::open(&known.0).unwrap().set_modified(yesterday).unwrap();
        known.refresh(&profile.slower(1.25));
        assert_eq!(known.get(), Some(profile.slower(1.25)));
        let age = std::fs::metadata(&known.0).unwrap().modified().unwrap().elapsed().unwrap();
        assert!(age > Duration::from_hours(23), "no younger for it: {age:?}");
        let long_ago = SystemTime::now() - KEEP - Duration::from_secs(10);
        std::fs::File::open(&known.0).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(known.get(), None);
        for text in [
            "",
            "1",
            "1 2 3 4 5 6 7",
            "1 2 3 4 5 6 7 x",
            "0 2 3 4 5 6 7 8",
            "1 2 3 4 5 6 7 -8",
            "1 2 3 4 5 6 7 8 9",
        ] {
            std::fs::write(&known.0, text).unwrap();
            assert_eq!(known.get(), None, "{text}");
        }
    }
}
