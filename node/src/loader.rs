//! Gets the tensors of a stage onto this machine: from the node's own model file, else from its
//! cache, else from the coordinator. Whatever the source, a tensor is used only if its bytes have
//! the hash that the plan names, now or when the unchanged file was hashed before; half-fetched
//! files have other names and are never used.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use millrace_engine::TensorSource;
use millrace_engine::cache::{Cache, InUse, KnownHashes};
use millrace_net::{Connection, MessageReceiver, MessageSender, NetError};
use millrace_shared::model::{ModelFiles, TensorEntry};
use millrace_shared::wire::control::{BlobRequest, BlobResponse, LoadReport};
use millrace_shared::wire::{MAX_BLOB_RANGE_BYTES, Plane};

/// Longest wait for one range: 4 MiB at 1 Mbit/s.
const RANGE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(40);
/// Longest answer before the bytes.
const MAX_RESPONSE_BYTES: usize = 4096;

/// Why a tensor is not here.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The file given with `--weights` is unusable.
    #[error("cannot use --weights {path}: {message}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// The cache folder cannot be written.
    #[error("cannot write the cache folder {path}: {source}; set MILLRACE_CACHE to a writable one")]
    Cache {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The coordinator did not deliver.
    #[error("cannot fetch tensor '{tensor}' from the coordinator: {message}")]
    Coordinator {
        /// Which.
        tensor: String,
        /// Why.
        message: String,
    },
}

/// Where tensors come from.
#[derive(Debug)]
pub struct Loader {
    weights: Option<PathBuf>,
    /// The cache folder, and that of tensors in it.
    folder: PathBuf,
    cache: PathBuf,
    connection: Connection,
    /// Keeps the tensors of the cache from being removed before the engine has them.
    held: OnceLock<InUse>,
}

impl Loader {
    /// A loader that asks the coordinator on `connection` last.
    pub fn new(weights: Option<PathBuf>, cache: &Path, connection: Connection) -> Self {
        let (folder, cache, held) = (cache.to_owned(), cache.join("tensors"), OnceLock::new());
        Self { weights, folder, cache, connection, held }
    }

    /// Makes every tensor available, as long as this lives; `progress` gets the bytes done so far.
    ///
    /// # Errors
    /// If one cannot be had from anywhere.
    pub async fn fetch(
        &self,
        tensors: &[TensorEntry],
        mut progress: impl FnMut(u64),
    ) -> Result<(Vec<TensorSource>, LoadReport), FetchError> {
        let started = Instant::now();
        let mut report = LoadReport::default();
        let cache = Cache::new(&self.folder);
        let files: Vec<PathBuf> = tensors.iter().map(|t| self.cache.join(hex(&t.hash))).collect();
        self.held.get_or_init(|| cache.hold(&files));
        let mut sources = self.local(tensors, &mut report).await?;
        let mut done = report.from_file + report.from_cache;
        progress(done);
        for (slot, entry) in sources.iter_mut().zip(tensors) {
            if slot.is_none() {
                *slot = Some(self.ask_coordinator(entry).await?);
                report.from_coordinator += entry.bytes;
                done += entry.bytes;
                progress(done);
            }
        }
        let fetched = report.from_coordinator;
        self.apart(move || {
            cache.tidy(fetched);
            Ok(())
        })
        .await?;
        report.seconds = started.elapsed().as_secs_f64();
        Ok((sources.into_iter().flatten().collect(), report))
    }

    /// What the model file and the cache hold; hashing runs off the actors' thread.
    async fn local(
        &self,
        tensors: &[TensorEntry],
        report: &mut LoadReport,
    ) -> Result<Vec<Option<TensorSource>>, FetchError> {
        let (weights, tensors) = (self.weights.clone(), tensors.to_vec());
        let (folder, cache) = (self.folder.clone(), self.cache.clone());
        let found = tokio::task::spawn_blocking(move || {
            let own = weights.map(|path| open_weights(&path)).transpose()?;
            let known = |of: &Path| KnownHashes::open(Some(&folder), of);
            let mut hashes: Vec<KnownHashes> =
                own.iter().flat_map(|own| &own.paths).map(|path| known(path)).collect();
            let mut fetched = known(&cache);
            let mut counts = LoadReport::default();
            let mut sources = Vec::with_capacity(tensors.len());
            for entry in &tensors {
                let from_file = own.as_ref().and_then(|own| in_file(&mut hashes, own, entry));
                let source = from_file.inspect(|_| counts.from_file += entry.bytes).or_else(|| {
                    let path = cache.join(hex(&entry.hash));
                    let source = TensorSource { entry: entry.clone(), path, offset: 0 };
                    verified(&source, &mut fetched)
                        .then_some(source)
                        .inspect(|_| counts.from_cache += entry.bytes)
                });
                sources.push(source);
            }
            hashes.into_iter().for_each(KnownHashes::save);
            fetched.save();
            Ok((sources, counts))
        });
        let (sources, counts) = found.await.unwrap_or_else(|e| {
            Err(FetchError::Cache { path: self.cache.clone(), source: std::io::Error::other(e) })
        })?;
        *report = counts;
        Ok(sources)
    }

    async fn ask_coordinator(&self, entry: &TensorEntry) -> Result<TensorSource, FetchError> {
        let failed =
            |message: String| FetchError::Coordinator { tensor: entry.name.clone(), message };
        let name = hex(&entry.hash);
        let part = Part::create(&self.cache, &name)?;
        let mut writer = part.writer;
        let mut offset = 0;
        while offset < entry.bytes {
            let len = (entry.bytes - offset).min(MAX_BLOB_RANGE_BYTES);
            let range = BlobRequest { hash: entry.hash, offset, len };
            let bytes = tokio::time::timeout(RANGE_DEADLINE, self.range(range))
                .await
                .map_err(|_| failed(format!("no answer within {RANGE_DEADLINE:?}")))?
                .map_err(|e| failed(e.to_string()))?;
            writer = self.apart(move || writer.append(&bytes)).await?;
            offset += len;
        }
        let (expected, path, from) = (entry.hash, self.cache.join(&name), part.path.0.clone());
        let fits = self.apart(move || writer.finish(&expected, &from, &path)).await?;
        if !fits {
            return Err(failed("the bytes do not have the announced hash".into()));
        }
        Ok(TensorSource { entry: entry.clone(), path: self.cache.join(name), offset: 0 })
    }

    /// Files and hashes off the actors' thread: heartbeats go out meanwhile.
    async fn apart<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, FetchError> {
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(|source| FetchError::Cache { path: self.cache.clone(), source })
    }

    async fn range(&self, request: BlobRequest) -> Result<Vec<u8>, NetError> {
        let (send, recv) = self.connection.open_stream(&Plane::Blob).await?;
        let (mut send, mut recv) = (MessageSender::new(send), MessageReceiver::new(recv));
        send.send(&request).await?;
        send.finish();
        match recv.recv_one::<BlobResponse>(MAX_RESPONSE_BYTES).await? {
            BlobResponse::Bytes(len) if len == request.len => {
                let mut bytes = vec![0; len as usize];
                recv.recv_bytes(&mut bytes).await?;
                Ok(bytes)
            }
            BlobResponse::Bytes(len) => {
                Err(NetError::Protocol(format!("{len} bytes announced, {} asked for", request.len)))
            }
            BlobResponse::Refused(message) => Err(NetError::Protocol(message)),
        }
    }
}

/// A file being fetched; it is removed unless it was renamed.
struct Part {
    path: Unfinished,
    writer: Writer,
}

struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone already where the fetch succeeded.
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Writer {
    file: File,
    hasher: blake3::Hasher,
}

impl Part {
    fn create(cache: &Path, name: &str) -> Result<Self, FetchError> {
        let cache_error = |source| FetchError::Cache { path: cache.to_owned(), source };
        std::fs::create_dir_all(cache).map_err(cache_error)?;
        let path = cache.join(format!("{name}.{}.part", uuid::Uuid::now_v7().simple()));
        let file = File::create(&path).map_err(cache_error)?;
        Ok(Self { path: Unfinished(path), writer: Writer { file, hasher: blake3::Hasher::new() } })
    }
}

impl Writer {
    fn append(mut self, bytes: &[u8]) -> std::io::Result<Self> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)?;
        Ok(self)
    }

    /// Gives the file its name if it has the hash.
    fn finish(self, hash: &[u8; 32], from: &Path, to: &Path) -> std::io::Result<bool> {
        if self.hasher.finalize().as_bytes() != hash {
            return Ok(false);
        }
        self.file.sync_data()?;
        std::fs::rename(from, to)?;
        Ok(true)
    }
}

fn open_weights(path: &Path) -> Result<ModelFiles, FetchError> {
    ModelFiles::open(path)
        .map_err(|e| FetchError::Weights { path: path.to_owned(), message: e.to_string() })
}

/// The tensor in the node's own files, if it is there and has the hash.
fn in_file(
    known: &mut [KnownHashes],
    files: &ModelFiles,
    entry: &TensorEntry,
) -> Option<TensorSource> {
    let own = files.tensor(&entry.name)?;
    if own.dtype != entry.dtype || own.dims != entry.dims {
        return None;
    }
    let path = files.path_of(own).to_owned();
    let source = TensorSource { entry: entry.clone(), path, offset: own.offset };
    if verified(&source, &mut known[usize::from(own.file)]) {
        return Some(source);
    }
    tracing::warn!(tensor = %entry.name, path = %source.path.display(), "the file's tensor differs from the model's, not used");
    None
}

/// Whether the bytes at the source have the hash of its entry.
fn verified(source: &TensorSource, known: &mut KnownHashes) -> bool {
    let hash = File::open(&source.path)
        .and_then(|file| known.hash(&file, source.offset, source.entry.bytes, &mut |_| ()));
    hash.is_ok_and(|hash| hash == source.entry.hash)
}

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}
