//! A whole stage frame in one 64-byte aligned buffer.
//!
//! The sender builds metadata first, writes the payload in place, then seals it with the checksum;
//! the receiver reads into the same kind of buffer and checks before anything is used. Neither side
//! copies the payload.

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error as RkyvError;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;

use super::data::{
    FrameError, FrameHeader, HEADER_BYTES, MaskMeta, OpenMeta, ResultMeta, StepMeta,
};
use super::stamp::Stamp;

/// The buffer type of frames: aligned for SIMD loads of the payload.
pub type FrameBuffer = AlignedVec<HEADER_BYTES>;

/// A frame: header, metadata, padding, payload.
pub struct Frame {
    header: FrameHeader,
    bytes: FrameBuffer,
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Metadata that a frame can carry.
pub trait FrameMeta: Sized {
    /// The rkyv bytes.
    ///
    /// # Errors
    /// If it cannot be serialised (out of memory).
    fn to_bytes(&self) -> Result<FrameBuffer, FrameError>;
    /// From rkyv bytes, validated.
    ///
    /// # Errors
    /// If they do not validate.
    fn from_bytes(bytes: &[u8]) -> Result<Self, FrameError>;
}

fn serialise<T>(value: &T) -> Result<FrameBuffer, FrameError>
where
    T: for<'a> rkyv::Serialize<HighSerializer<FrameBuffer, ArenaHandle<'a>, RkyvError>>,
{
    rkyv::api::high::to_bytes_in::<_, RkyvError>(value, FrameBuffer::new())
        .map_err(|e| FrameError::Metadata(e.to_string()))
}

fn validate<T>(bytes: &[u8]) -> Result<T, FrameError>
where
    T: rkyv::Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, RkyvError>>
        + rkyv::Deserialize<T, HighDeserializer<RkyvError>>,
{
    let archived = rkyv::access::<T::Archived, RkyvError>(bytes)
        .map_err(|e| FrameError::Metadata(e.to_string()))?;
    rkyv::deserialize::<T, RkyvError>(archived).map_err(|e| FrameError::Metadata(e.to_string()))
}

macro_rules! frame_meta {
    ($($t:ty),*) => {$(
        impl FrameMeta for $t {
            fn to_bytes(&self) -> Result<FrameBuffer, FrameError> { serialise(self) }
            fn from_bytes(bytes: &[u8]) -> Result<Self, FrameError> { validate::<$t>(bytes) }
        }
    )*};
}
frame_meta!(StepMeta, ResultMeta, OpenMeta, MaskMeta);

impl Frame {
    /// Lays a frame out with room for `payload_len` bytes (zeroed). Lengths and checksum in
    /// `header` are filled in. Write the payload, then [`Frame::seal`].
    ///
    /// # Errors
    /// If metadata or payload exceed the limits of the wire.
    pub fn build<M: FrameMeta>(
        header: FrameHeader,
        meta: &M,
        payload_len: usize,
    ) -> Result<Self, FrameError> {
        let meta = meta.to_bytes()?;
        let header = FrameHeader {
            meta_len: u32::try_from(meta.len()).map_err(|_| FrameError::TooLong {
                what: "frame metadata",
                len: meta.len() as u64,
                limit: super::MAX_FRAME_META_BYTES as u64,
            })?,
            payload_len: payload_len as u64,
            crc: 0,
            ..header
        };
        // The same check that the receiver will make.
        FrameHeader::decode(&header.encode())?;
        let mut bytes = FrameBuffer::with_capacity(header.frame_len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(&meta);
        bytes.resize(header.frame_len(), 0);
        Ok(Self { header, bytes })
    }

    /// Writes other metadata of the same length in place, before sealing.
    ///
    /// # Errors
    /// If the length is another.
    pub fn replace_meta<M: FrameMeta>(&mut self, meta: &M) -> Result<(), FrameError> {
        let meta = meta.to_bytes()?;
        if meta.len() != self.header.meta_len as usize {
            return Err(FrameError::Inconsistent(format!(
                "metadata of {} bytes in the place of {}",
                meta.len(),
                self.header.meta_len
            )));
        }
        self.bytes[HEADER_BYTES..HEADER_BYTES + meta.len()].copy_from_slice(&meta);
        Ok(())
    }

    /// Says when the payload was ready; before sealing.
    #[must_use]
    pub fn stamped(mut self, ready: Stamp) -> Self {
        self.header.ready = ready;
        self
    }

    /// Computes the checksum and writes it into the header.
    #[must_use]
    pub fn seal(mut self) -> Self {
        self.header.crc = self.header.checksum(&self.bytes[HEADER_BYTES..]);
        let encoded = self.header.encode();
        self.bytes[..HEADER_BYTES].copy_from_slice(&encoded);
        self
    }

    /// Takes a received buffer, whose first 64 bytes are the encoded `header`.
    ///
    /// # Errors
    /// If length or checksum do not match the header.
    pub fn from_received(header: FrameHeader, bytes: FrameBuffer) -> Result<Self, FrameError> {
        if bytes.len() != header.frame_len() {
            return Err(FrameError::Inconsistent(format!(
                "{} bytes received, the header announces {}",
                bytes.len(),
                header.frame_len()
            )));
        }
        let found = header.checksum(&bytes[HEADER_BYTES..]);
        if found != header.crc {
            return Err(FrameError::Checksum { expected: header.crc, found });
        }
        Ok(Self { header, bytes })
    }

    /// Parses a whole frame from bytes (tests, fuzzing, in-process transport).
    ///
    /// # Errors
    /// If anything does not check.
    pub fn parse(bytes: FrameBuffer) -> Result<Self, FrameError> {
        let head: &[u8; HEADER_BYTES] =
            bytes
                .get(..HEADER_BYTES)
                .and_then(|b| b.try_into().ok())
                .ok_or_else(|| FrameError::Inconsistent("shorter than a header".into()))?;
        let header = FrameHeader::decode(head)?;
        Self::from_received(header, bytes)
    }

    /// The header.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// The metadata, validated.
    ///
    /// # Errors
    /// If the bytes are not a valid archive of `M`.
    pub fn meta<M: FrameMeta>(&self) -> Result<M, FrameError> {
        M::from_bytes(&self.bytes[HEADER_BYTES..HEADER_BYTES + self.header.meta_len as usize])
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.header.payload_offset()..]
    }

    /// The payload, to be written before sealing.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        let offset = self.header.payload_offset();
        &mut self.bytes[offset..]
    }

    /// The payload as 32-bit floats.
    ///
    /// # Errors
    /// If its length is not a multiple of four.
    pub fn payload_f32(&self) -> Result<&[f32], FrameError> {
        cast(self.payload())
    }

    /// The payload as token ids.
    ///
    /// # Errors
    /// If its length is not a multiple of four.
    pub fn payload_u32(&self) -> Result<&[u32], FrameError> {
        cast(self.payload())
    }

    /// The whole frame as it goes over the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The buffer, for sending without a copy.
    pub fn into_buffer(self) -> FrameBuffer {
        self.bytes
    }
}

fn cast<T: bytemuck::Pod>(bytes: &[u8]) -> Result<&[T], FrameError> {
    bytemuck::try_cast_slice(bytes)
        .map_err(|e| FrameError::Inconsistent(format!("payload of {} bytes: {e}", bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Epoch, MicroBatchId, PipelineId, SequenceId};
    use crate::model::Dtype;
    use crate::wire::data::{FrameKind, Row, StageTime, TableUpdate, Want};

    fn header() -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Activations,
            dtype: Dtype::F32,
            pipeline: PipelineId(1),
            epoch: Epoch(7),
            micro_batch: MicroBatchId(42),
            rows: 3,
            meta_len: 0,
            payload_len: 0,
            crc: 0,
            ready: Stamp { clock: 1, nanos: u64::MAX - 5 },
        }
    }

    fn meta() -> StepMeta {
        StepMeta {
            rows: vec![Row {
                sequence: SequenceId(9),
                sequence_epoch: 0,
                position: 5,
                count: 3,
                want: Want::Sample,
            }],
            tables: vec![TableUpdate { sequence: SequenceId(9), first: 0, blocks: vec![1, 2] }],
            released: vec![SequenceId(4)],
            ..StepMeta::default()
        }
    }

    fn sample() -> Frame {
        let mut frame = Frame::build(header(), &meta(), 24).expect("within limits");
        frame.payload_mut().copy_from_slice(bytemuck::cast_slice(&[1f32, 2., 3., 4., 5., 6.]));
        frame.seal()
    }

    #[test]
    fn round_trip() {
        let frame = Frame::parse(sample().into_buffer()).expect("valid");
        assert_eq!(frame.meta::<StepMeta>().expect("valid"), meta());
        assert_eq!(frame.payload_f32().expect("floats"), &[1., 2., 3., 4., 5., 6.]);
        assert_eq!(frame.header().epoch, Epoch(7));
        assert_eq!(frame.header().ready, header().ready);
        assert_eq!(frame.payload().as_ptr() as usize % HEADER_BYTES, 0, "payload is aligned");
    }

    /// A stage knows what it spent only when the payload is there.
    #[test]
    fn metadata_of_the_same_length_is_replaced_in_place() {
        let placed = StepMeta { times: vec![StageTime::default()], ..meta() };
        let mut frame = Frame::build(header(), &placed, 24).expect("within limits");
        frame.payload_mut().fill(1);
        let time = StageTime { wait_micros: 3, step_micros: u32::MAX, hop_micros: 9 };
        let known = StepMeta { times: vec![time], ..meta() };
        frame.replace_meta(&known).expect("the same length");
        assert!(frame.replace_meta(&meta()).is_err(), "another length");
        let frame = Frame::parse(frame.seal().into_buffer()).expect("valid");
        assert_eq!(frame.meta::<StepMeta>().expect("valid"), known);
        assert!(frame.payload().iter().all(|&b| b == 1));
    }

    /// Every single-bit error and every truncation is refused; nothing panics.
    #[test]
    fn damage_is_always_found() {
        let good = sample().into_buffer();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::parse(bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            let mut short = FrameBuffer::new();
            short.extend_from_slice(&good[..len]);
            assert!(Frame::parse(short).is_err(), "length {len}");
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_allocation() {
        let mut h = FrameHeader { payload_len: u64::MAX, ..header() }.encode();
        assert!(matches!(FrameHeader::decode(&h), Err(FrameError::TooLong { .. })));
        h = FrameHeader { meta_len: u32::MAX, ..header() }.encode();
        assert!(matches!(FrameHeader::decode(&h), Err(FrameError::TooLong { .. })));
    }
}
