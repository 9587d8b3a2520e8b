//! Certificates that change while endpoints use them: a member's own after renewal, a company's
//! after its files were replaced; and who may show one.
//!
//! A handshake takes what is there at that moment; connections that stand are not touched. What a
//! file holds is used only if certificate and key belong together, else the former pair stays.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use millrace_shared::wire::COORDINATOR_NAME;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::pem::PemObject;

use crate::identity::{Validity, parse_certificates};
use crate::revoked::Revocations;
use crate::tls::provider;
use crate::{Identity, NetError, PeerName, private_file};

/// A member's identity that can be renewed while it is in use. Clones share it.
#[derive(Clone)]
pub struct LiveIdentity {
    current: Arc<RwLock<Arc<CertifiedKey>>>,
    ca_der: Arc<Vec<u8>>,
}

impl std::fmt::Debug for LiveIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LiveIdentity")
    }
}

impl LiveIdentity {
    /// Begins with this one.
    ///
    /// # Errors
    /// If it is unusable.
    pub fn new(identity: &Identity) -> Result<Self, NetError> {
        let current = Arc::new(RwLock::new(Arc::new(certified(identity)?)));
        Ok(Self { current, ca_der: Arc::new(identity.ca_der.clone()) })
    }

    /// Uses another from the next handshake on.
    ///
    /// # Errors
    /// If it is unusable, or of another CA.
    pub fn replace(&self, identity: &Identity) -> Result<(), NetError> {
        if identity.ca_der != *self.ca_der {
            return Err(NetError::Identity("a renewed identity must have the same CA".into()));
        }
        let key = Arc::new(certified(identity)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = key;
        Ok(())
    }

    pub(crate) fn ca_der(&self) -> &[u8] {
        &self.ca_der
    }

    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for LiveIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

impl ResolvesClientCert for LiveIdentity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn certified(identity: &Identity) -> Result<CertifiedKey, NetError> {
    let chain = vec![identity.cert_der.clone().into(), identity.ca_der.clone().into()];
    let key = PrivatePkcs8KeyDer::from(identity.key_der.clone()).into();
    from_der(chain, key)
}

fn from_der(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, NetError> {
    CertifiedKey::from_der(chain, key, &provider())
        .map_err(|e| NetError::Identity(format!("certificate and key: {e}")))
}

/// A certificate and its key in PEM files that somebody else keeps up to date. Clones share it.
#[derive(Clone)]
pub struct CertFiles {
    cert: PathBuf,
    key: PathBuf,
    current: Arc<RwLock<Read>>,
}

/// What the files held, and when each had been changed.
struct Read {
    key: Arc<CertifiedKey>,
    changed: [Option<SystemTime>; 2],
}

impl std::fmt::Debug for CertFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertFiles").field("cert", &self.cert).finish_non_exhaustive()
    }
}

impl CertFiles {
    /// Reads both: the certificate first in its file, then those that lead to a root.
    ///
    /// # Errors
    /// If one cannot be read, or they do not belong together; the file is named.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, NetError> {
        let changed = changed(cert, key);
        let read = Read { key: Arc::new(read(cert, key)?), changed };
        let current = Arc::new(RwLock::new(read));
        Ok(Self { cert: cert.to_owned(), key: key.to_owned(), current })
    }

    /// Reads both again if a file has changed, or if `force`d; whether it did.
    ///
    /// # Errors
    /// As [`CertFiles::load`]; the former pair stays in use then.
    pub fn reload(&self, force: bool) -> Result<bool, NetError> {
        let changed = changed(&self.cert, &self.key);
        let known = self.current.read().unwrap_or_else(PoisonError::into_inner).changed;
        if changed == known && !force {
            return Ok(false);
        }
        let key = Arc::new(read(&self.cert, &self.key)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Read { key, changed };
        Ok(true)
    }

    /// Whether it is valid at `now` (Unix seconds).
    pub fn is_valid_at(&self, now: u64) -> bool {
        let validity = self.get().cert.first().map(|leaf| Validity::of_certificate(leaf));
        matches!(validity, Some(Ok(v)) if (v.from..=v.until).contains(&now))
    }

    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).key)
    }
}

fn changed(cert: &Path, key: &Path) -> [Option<SystemTime>; 2] {
    [cert, key].map(|path| path.metadata().and_then(|m| m.modified()).ok())
}

fn read(cert: &Path, key: &Path) -> Result<CertifiedKey, NetError> {
    let wrong = |path: &Path, e: &dyn std::fmt::Display| {
        NetError::Identity(format!("{}: {e}", path.display()))
    };
    let chain = parse_certificates(&private_file::read(cert)?).map_err(|e| wrong(cert, &e))?;
    if chain.is_empty() {
        return Err(wrong(cert, &"no certificate in it"));
    }
    let der =
        PrivateKeyDer::from_pem_slice(&private_file::read(key)?).map_err(|e| wrong(key, &e))?;
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    from_der(chain, der).map_err(|e| wrong(key, &format!("not the key of {}: {e}", cert.display())))
}

/// What a server for the public shows: to who asks for the coordinator's own name the cluster's
/// certificate, to everybody else the company's, where there is one.
#[derive(Debug)]
pub(crate) struct PublicCerts {
    pub(crate) own: LiveIdentity,
    pub(crate) company: Option<CertFiles>,
}

impl ResolvesServerCert for PublicCerts {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        match &self.company {
            Some(company) if hello.server_name() != Some(COORDINATOR_NAME) => Some(company.get()),
            _ => Some(self.own.get()),
        }
    }
}

/// Shows the company's certificate to everybody.
#[derive(Debug)]
pub(crate) struct CompanyOnly(pub(crate) CertFiles);

impl ResolvesServerCert for CompanyOnly {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.get())
    }
}

/// Members of the cluster, but for those that are kept out.
#[derive(Debug)]
pub(crate) struct MembersOnly {
    pub(crate) inner: Arc<dyn ClientCertVerifier>,
    pub(crate) revoked: Arc<Revocations>,
}

impl ClientCertVerifier for MembersOnly {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        match PeerName::of_certificate(end_entity) {
            Ok(PeerName::Node(id)) if self.revoked.has(id) => Err(CertificateError::Revoked.into()),
            _ => Ok(verified),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
