//! Weights by content: the tensors of the served model, by BLAKE3 hash, in ranges.
//!
//! Serves members only (the stream comes over mutual TLS), from the model's files, at the blob plane's
//! low priority. Reads run off the actors' thread.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millrace_net::{MessageReceiver, MessageSender, NetError, RecvStream, SendStream};
use millrace_shared::model::{ModelManifest, TensorEntry};
use millrace_shared::wire::MAX_BLOB_RANGE_BYTES;
use millrace_shared::wire::control::{BlobRequest, BlobResponse};

/// A request is a few dozen bytes.
const MAX_REQUEST_BYTES: usize = 256;
/// From the opening of the stream to the request, and for a peer to take a range.
const BLOB_DEADLINE: Duration = Duration::from_secs(40);

/// The blobs of a model.
#[derive(Debug)]
pub struct Blobs {
    files: Vec<Arc<File>>,
    /// Hash to file, offset and length.
    tensors: HashMap<[u8; 32], (usize, u64, u64)>,
}

impl Blobs {
    /// Serves the tensors of `manifest` from its files.
    ///
    /// # Errors
    /// If a file cannot be opened.
    pub fn open(paths: &[PathBuf], manifest: &ModelManifest) -> std::io::Result<Self> {
        let place = |t: &TensorEntry| (t.hash, (usize::from(t.file), t.offset, t.bytes));
        let files = paths.iter().map(|path| File::open(path).map(Arc::new));
        let tensors = manifest.tensors.iter().map(place).collect();
        Ok(Self { files: files.collect::<Result<_, _>>()?, tensors })
    }

    /// Answers the one request of a stream.
    ///
    /// # Errors
    /// If the stream breaks or the peer is too slow.
    pub async fn serve(&self, send: SendStream, recv: RecvStream) -> Result<(), NetError> {
        let late = |_| NetError::Deadline { what: "a blob range", after: BLOB_DEADLINE };
        tokio::time::timeout(BLOB_DEADLINE, self.exchange(send, recv)).await.map_err(late)?
    }

    async fn exchange(&self, send: SendStream, recv: RecvStream) -> Result<(), NetError> {
        let mut send = MessageSender::new(send);
        let request: BlobRequest = MessageReceiver::new(recv).recv_one(MAX_REQUEST_BYTES).await?;
        match self.read(request).await {
            Ok(bytes) => {
                send.send(&BlobResponse::Bytes(bytes.len() as u64)).await?;
                send.send_bytes(bytes).await?;
            }
            Err(message) => send.send(&BlobResponse::Refused(message)).await?,
        }
        send.finish();
        Ok(())
    }

    async fn read(&self, request: BlobRequest) -> Result<Bytes, String> {
        let hash = || blake3::Hash::from_bytes(request.hash).to_hex();
        let &(file, start, size) =
            self.tensors.get(&request.hash).ok_or_else(|| format!("no blob {} here", hash()))?;
        let fits = request.offset.checked_add(request.len).is_some_and(|end| end <= size);
        if !fits || request.len > MAX_BLOB_RANGE_BYTES {
            return Err(format!(
                "{} bytes from {} of a blob of {size}: at most {MAX_BLOB_RANGE_BYTES} at a time",
                request.len, request.offset
            ));
        }
        let file = Arc::clone(&self.files[file]);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; request.len as usize];
            file.read_exact_at(&mut bytes, start + request.offset).map(|()| Bytes::from(bytes))
        });
        read.await.map_err(|e| e.to_string())?.map_err(|e| format!("cannot read the model: {e}"))
    }
}
