//! Connections that an earlier life of this endpoint had: their peers learn at once that they are
//! gone.
//!
//! After a crash nothing tells a peer that its connection is void but silence, until its idle
//! timeout. QUIC's remedy (RFC 9000, section 10.3) is the stateless reset: the new life answers a
//! packet that belongs to no connection with a token that only it could know. For that the tokens
//! have to follow from a secret that both lives share, and the names of connections must be accepted
//! although this life did not draw them. Peers notice with their next keep-alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use sha2::{Digest as _, Sha256};

use crate::{NetError, private_file};

/// Bytes of a block of SHA-256.
const BLOCK: usize = 64;
/// Bytes of a connection's name, as quinn's own.
const ID_BYTES: usize = 8;

/// A key for HMAC-SHA-256 (RFC 2104).
#[derive(Clone, Copy)]
struct Key([u8; 32]);

impl Key {
    fn mac(&self, data: &[u8]) -> [u8; 32] {
        let padded = |pad: u8| {
            let mut block = [pad; BLOCK];
            block.iter_mut().zip(self.0).for_each(|(b, k)| *b ^= k);
            block
        };
        let inner = Sha256::new().chain_update(padded(0x36)).chain_update(data).finalize();
        Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().into()
    }
}

impl HmacKey for Key {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(&self.mac(data));
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let own = self.mac(data);
        let differ = own.iter().zip(signature).fold(0, |all, (a, b)| all | (a ^ b));
        if signature.len() == own.len() && differ == 0 { Ok(()) } else { Err(CryptoError) }
    }
}

/// Draws names of connections; takes those of other lives for possible ones.
struct Ids {
    key: Key,
    next: Arc<AtomicU64>,
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        ConnectionId::new(&self.key.mac(&number.to_le_bytes())[..ID_BYTES])
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Settings of an endpoint whose next life, with the same secret, resets the connections of this one.
///
/// # Errors
/// If the system has no random numbers.
pub(crate) fn lasting(secret: &[u8]) -> Result<EndpointConfig, NetError> {
    let reset = Sha256::new().chain_update(b"millrace stateless resets").chain_update(secret);
    let mut config = EndpointConfig::new(Arc::new(Key(reset.finalize().into())));
    let (key, next) = (Key(private_file::random()?), Arc::new(AtomicU64::new(0)));
    config.cid_generator(move || Box::new(Ids { key, next: Arc::clone(&next) }));
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 1, with a key that is padded to 32 bytes, which changes nothing.
    #[test]
    fn the_mac_is_hmac_sha_256() {
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let mac = Key(key).mac(b"Hi There");
        assert_eq!(mac[..8], [0xb0, 0x34, 0x4c, 0x61, 0xd8, 0xdb, 0x38, 0x53]);
        assert!(Key(key).verify(b"Hi There", &mac).is_ok());
        assert!(Key(key).verify(b"Hi there", &mac).is_err());
    }

    #[test]
    fn names_differ() {
        let ids = || Ids { key: Key([1; 32]), next: Arc::default() };
        let (mut a, mut b) = (ids(), ids());
        assert_eq!(a.generate_cid(), b.generate_cid());
        assert_ne!(a.generate_cid(), a.generate_cid());
        let other = ConnectionId::new(&[9; ID_BYTES]);
        assert!(a.validate(&other).is_ok());
    }
}
