//! The cluster's certificate authority, and the identities it signs.
//!
//! A certificate carries one name, chosen by the coordinator: `coordinator.millrace.internal` or
//! `<uuid>.node.millrace.internal`. Of a certificate request only the public key and its proof of
//! possession are used; names and extensions that it asks for are ignored. Nothing here talks to
//! the network; who is kept out is in [`crate::revoked`].

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use millrace_shared::id::NodeId;
use millrace_shared::wire::{COORDINATOR_NAME, node_name, node_of_name};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{NetError, private_file};

/// The CA lives as long as a cluster is likely to.
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Members renew theirs when two thirds of it are over, so a month is left to notice trouble.
pub const MEMBER_LIFETIME: Duration = Duration::from_secs(90 * 86_400);
/// Certificates are valid from a day ago, so that clocks may differ.
const CLOCK_SLACK: Duration = Duration::from_secs(86_400);

/// Whom a certificate names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerName {
    /// The coordinator.
    Coordinator,
    /// A node.
    Node(NodeId),
}

impl PeerName {
    /// The DNS name in the certificate.
    pub fn dns(self) -> String {
        match self {
            Self::Coordinator => COORDINATOR_NAME.to_owned(),
            Self::Node(id) => node_name(id),
        }
    }

    /// Reads the one name of a leaf certificate.
    ///
    /// # Errors
    /// If it does not have exactly one, or one that is not ours.
    pub fn of_certificate(der: &[u8]) -> Result<Self, NetError> {
        let unusable = |what: &str| NetError::Identity(format!("unusable certificate: {what}"));
        let (_, cert) = X509Certificate::from_der(der).map_err(|_| unusable("not X.509"))?;
        let names = cert
            .subject_alternative_name()
            .map_err(|_| unusable("malformed names"))?
            .ok_or_else(|| unusable("it names nobody"))?;
        let [GeneralName::DNSName(name)] = names.value.general_names.as_slice() else {
            return Err(unusable("it must carry exactly one DNS name"));
        };
        if *name == COORDINATOR_NAME {
            return Ok(Self::Coordinator);
        }
        node_of_name(name)
            .map(Self::Node)
            .ok_or_else(|| unusable(&format!("{name:?} is not a name of this system")))
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator => f.write_str("the coordinator"),
            Self::Node(id) => write!(f, "node {id}"),
        }
    }
}

/// When a certificate is valid, Unix seconds, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: u64,
    /// The last second.
    pub until: u64,
}

impl Validity {
    /// From now on, with a day's slack for clocks that differ.
    pub fn lasting(lifetime: Duration) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let from = now.saturating_sub(CLOCK_SLACK).as_secs();
        Self { from, until: (now + lifetime).as_secs() }
    }

    /// Reads it from a certificate.
    ///
    /// # Errors
    /// If that is malformed.
    pub fn of_certificate(der: &[u8]) -> Result<Self, NetError> {
        let (_, cert) = X509Certificate::from_der(der)
            .map_err(|_| NetError::Identity("unusable certificate: not X.509".into()))?;
        let seconds = |time: x509_parser::time::ASN1Time| time.timestamp().try_into().unwrap_or(0);
        let validity = cert.validity();
        Ok(Self { from: seconds(validity.not_before), until: seconds(validity.not_after) })
    }

    /// Whether it should be renewed by `now`: two thirds are over, or it was made by a clock that was
    /// ahead and has not begun.
    pub fn is_due(self, now: u64) -> bool {
        now < self.from
            || now >= self.until.saturating_sub(self.until.saturating_sub(self.from) / 3)
    }
}

/// SHA-256 of a certificate: what join tokens pin.
pub fn fingerprint(certificate_der: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate_der).into()
}

/// A member's certificate, key and CA certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// The member's certificate.
    pub cert_der: Vec<u8>,
    /// Its private key, PKCS#8.
    pub key_der: Vec<u8>,
    /// The cluster's CA certificate.
    pub ca_der: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("name", &self.name().ok()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Whom it names.
    ///
    /// # Errors
    /// If the certificate is not one of ours.
    pub fn name(&self) -> Result<PeerName, NetError> {
        PeerName::of_certificate(&self.cert_der)
    }

    /// Whether the key is the one that the certificate is for.
    pub fn is_pair(&self) -> bool {
        let key = NodeKey { key_der: self.key_der.clone(), csr_der: Vec::new() };
        key.certified(self.cert_der.clone(), self.ca_der.clone()).is_ok()
    }

    /// When it is valid.
    ///
    /// # Errors
    /// If the certificate is malformed.
    pub fn validity(&self) -> Result<Validity, NetError> {
        Validity::of_certificate(&self.cert_der)
    }

    /// Writes `{prefix}.pem` (certificate, then CA) and `{prefix}.key` (mode 0600) into `dir`.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn save(&self, dir: &Path, prefix: &str) -> Result<(), NetError> {
        private_file::create_dir(dir)?;
        let key = pem("PRIVATE KEY", &self.key_der);
        private_file::write(&dir.join(format!("{prefix}.key")), key.as_bytes())?;
        let chain = pem("CERTIFICATE", &self.cert_der) + &pem("CERTIFICATE", &self.ca_der);
        private_file::write(&dir.join(format!("{prefix}.pem")), chain.as_bytes())
    }

    /// Reads what [`Identity::save`] wrote.
    ///
    /// # Errors
    /// If a file is missing or is not what it should be.
    pub fn load(dir: &Path, prefix: &str) -> Result<Self, NetError> {
        let path = dir.join(format!("{prefix}.pem"));
        let mut certs = certificates(&path)?.into_iter();
        let (Some(cert_der), Some(ca_der), None) = (certs.next(), certs.next(), certs.next())
        else {
            return Err(NetError::Identity(format!(
                "{} must hold two certificates: the member's, then the CA's",
                path.display()
            )));
        };
        let key_der = private_key(&dir.join(format!("{prefix}.key")))?;
        Ok(Self { cert_der, key_der, ca_der })
    }
}

/// A node's own key and the request to have it certified. The key never leaves the node.
pub struct NodeKey {
    key_der: Vec<u8>,
    csr_der: Vec<u8>,
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeKey").finish_non_exhaustive()
    }
}

impl NodeKey {
    /// Draws a key and signs a request with it.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn generate() -> Result<Self, NetError> {
        Self::from_pair(&KeyPair::generate().map_err(unexpected)?)
    }

    /// Writes the key to `{prefix}.key` (mode 0600), so that an interrupted join can be repeated
    /// with the same key.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, dir: &Path, prefix: &str) -> Result<(), NetError> {
        private_file::create_dir(dir)?;
        let key = pem("PRIVATE KEY", &self.key_der);
        private_file::write(&dir.join(format!("{prefix}.key")), key.as_bytes())
    }

    /// Reads what [`NodeKey::save`] wrote and signs a new request.
    ///
    /// # Errors
    /// If the file is missing or no key.
    pub fn load(dir: &Path, prefix: &str) -> Result<Self, NetError> {
        let path = dir.join(format!("{prefix}.key"));
        let der = private_key(&path)?;
        let pair =
            key_pair(&der).map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))?;
        Self::from_pair(&pair)
    }

    fn from_pair(pair: &KeyPair) -> Result<Self, NetError> {
        let request = CertificateParams::default().serialize_request(pair).map_err(unexpected)?;
        Ok(Self { key_der: pair.serialize_der(), csr_der: request.der().to_vec() })
    }

    /// The certificate request, DER.
    pub fn csr_der(&self) -> &[u8] {
        &self.csr_der
    }

    /// The key of an identity, and a new request with it.
    ///
    /// # Errors
    /// If the key is unusable.
    pub fn of_identity(identity: &Identity) -> Result<Self, NetError> {
        let pair = key_pair(&identity.key_der).map_err(|e| NetError::Identity(e.to_string()))?;
        Self::from_pair(&pair)
    }

    /// Puts key and certificate together.
    ///
    /// # Errors
    /// If the certificate is for another key.
    pub fn certified(&self, cert_der: Vec<u8>, ca_der: Vec<u8>) -> Result<Identity, NetError> {
        let ours = key_pair(&self.key_der)
            .map_err(|e| NetError::Identity(e.to_string()))?
            .subject_public_key_info();
        let (_, cert) = X509Certificate::from_der(&cert_der)
            .map_err(|_| NetError::Identity("the signed certificate is not X.509".into()))?;
        if cert.public_key().raw != ours {
            return Err(NetError::Identity("the signed certificate is for another key".into()));
        }
        Ok(Identity { cert_der, key_der: self.key_der.clone(), ca_der })
    }
}

/// A checked certificate request: a public key whose holder has proved to possess it.
pub struct ProvenKey(CertificateSigningRequestParams);

impl fmt::Debug for ProvenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProvenKey({})", private_file::hex(&self.spki_sha256()))
    }
}

impl ProvenKey {
    /// Parses a PKCS#10 request and verifies its signature by its own key.
    ///
    /// # Errors
    /// If it is malformed, of another kind of key, or not signed by the key.
    pub fn from_csr(csr_der: &[u8]) -> Result<Self, NetError> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
                .map_err(|e| NetError::Identity(format!("unusable certificate request: {e}")))?;
        if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(NetError::Identity(
                "unusable certificate request: the key must be ECDSA P-256".into(),
            ));
        }
        Ok(Self(request))
    }

    /// Whether this is the key that a certificate is for.
    pub(crate) fn is_of(&self, certificate_der: &[u8]) -> bool {
        X509Certificate::from_der(certificate_der).is_ok_and(|(_, certificate)| {
            certificate.public_key().raw == self.0.public_key.subject_public_key_info()
        })
    }

    /// SHA-256 of the public key, which names the key in records.
    pub fn spki_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.0.public_key.subject_public_key_info()).into()
    }
}

/// The cluster's certificate authority.
pub struct ClusterCa {
    issuer: Issuer<'static, KeyPair>,
    cert_der: Vec<u8>,
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterCa({})", private_file::hex(&self.fingerprint()))
    }
}

impl ClusterCa {
    /// Makes a new CA, in memory.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn create() -> Result<Self, NetError> {
        let key = KeyPair::generate().map_err(unexpected)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        // Each CA has its own name, so that a peer of another cluster is told "unknown issuer".
        let serial = private_file::hex(&private_file::random::<8>()?);
        params.distinguished_name.push(DnType::CommonName, format!("Millrace cluster CA {serial}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, Validity::lasting(CA_LIFETIME));
        let cert_der = params.self_signed(&key).map_err(unexpected)?.der().to_vec();
        Ok(Self { issuer: Issuer::new(params, key), cert_der })
    }

    /// Writes `ca.pem` and `ca.key` (mode 0600) into `dir` (mode 0700 where it is made).
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), NetError> {
        private_file::create_dir(dir)?;
        let key = pem("PRIVATE KEY", &self.issuer.key().serialize_der());
        private_file::write(&dir.join("ca.key"), key.as_bytes())?;
        private_file::write(&dir.join("ca.pem"), self.ca_pem().as_bytes())
    }

    /// Reads what [`ClusterCa::save`] wrote.
    ///
    /// # Errors
    /// If a file is missing, malformed, or the key is not the certificate's.
    pub fn load(dir: &Path) -> Result<Self, NetError> {
        let path = dir.join("ca.pem");
        let bad = |e: &dyn fmt::Display| NetError::Identity(format!("{}: {e}", path.display()));
        let cert_der =
            certificates(&path)?.into_iter().next().ok_or_else(|| bad(&"no certificate in it"))?;
        let key = key_pair(&private_key(&dir.join("ca.key"))?).map_err(|e| bad(&e))?;
        let (_, cert) = X509Certificate::from_der(&cert_der).map_err(|e| bad(&e))?;
        if cert.public_key().raw != key.subject_public_key_info() {
            return Err(bad(&"ca.key is not the key of this certificate"));
        }
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(cert_der.as_slice()), key)
            .map_err(|e| bad(&e))?;
        Ok(Self { issuer, cert_der })
    }

    /// The CA certificate, DER.
    pub fn ca_der(&self) -> &[u8] {
        &self.cert_der
    }

    /// The CA certificate, PEM.
    pub fn ca_pem(&self) -> String {
        pem("CERTIFICATE", &self.cert_der)
    }

    /// SHA-256 of the CA certificate.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.cert_der)
    }

    /// Makes the coordinator's identity with a new key.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn issue_coordinator(&self) -> Result<Identity, NetError> {
        self.issue(PeerName::Coordinator)
    }

    /// Makes a node's identity with a new key, for nodes in the coordinator's own process.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn issue_node(&self, id: NodeId) -> Result<Identity, NetError> {
        self.issue(PeerName::Node(id))
    }

    /// [`ClusterCa::issue_node`] for a certificate that is valid at other times.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn issue_node_for(&self, id: NodeId, validity: Validity) -> Result<Identity, NetError> {
        let name = PeerName::Node(id);
        self.with_new_key(|key| self.sign(key, member(name)?, validity))
    }

    /// Makes an identity for HTTPS under these names and addresses. No member's: it carries none
    /// of their names, and cannot be shown as a client.
    ///
    /// # Errors
    /// If a name is none, or the system has no randomness to give.
    pub fn issue_web(&self, names: &[String]) -> Result<Identity, NetError> {
        let is_members = |name: &String| name == COORDINATOR_NAME || node_of_name(name).is_some();
        if let Some(name) = names.iter().find(|name| is_members(name)) {
            return Err(NetError::Identity(format!("{name} is a member's name")));
        }
        let mut params = CertificateParams::new(names).map_err(unexpected)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Millrace HTTPS");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.with_new_key(|key| self.sign(key, params, Validity::lasting(MEMBER_LIFETIME)))
    }

    fn issue(&self, name: PeerName) -> Result<Identity, NetError> {
        let validity = Validity::lasting(MEMBER_LIFETIME);
        self.with_new_key(|key| self.sign(key, member(name)?, validity))
    }

    fn with_new_key(
        &self,
        sign: impl FnOnce(&KeyPair) -> Result<Vec<u8>, NetError>,
    ) -> Result<Identity, NetError> {
        let key = KeyPair::generate().map_err(unexpected)?;
        let cert_der = sign(&key)?;
        Ok(Identity { cert_der, key_der: key.serialize_der(), ca_der: self.cert_der.clone() })
    }

    /// Signs a node's public key under the name `id`; nothing else of its request is used.
    ///
    /// # Errors
    /// If the certificate cannot be built.
    pub fn sign_node(&self, key: &ProvenKey, id: NodeId) -> Result<Vec<u8>, NetError> {
        let validity = Validity::lasting(MEMBER_LIFETIME);
        self.sign(&key.0.public_key, member(PeerName::Node(id))?, validity)
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        mut params: CertificateParams,
        validity: Validity,
    ) -> Result<Vec<u8>, NetError> {
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, validity);
        Ok(params.signed_by(key, &self.issuer).map_err(unexpected)?.der().to_vec())
    }
}

fn member(name: PeerName) -> Result<CertificateParams, NetError> {
    let mut params = CertificateParams::new(vec![name.dns()]).map_err(unexpected)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name.to_string());
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(validity.from);
    params.not_after = epoch + Duration::from_secs(validity.until);
}

fn unexpected(e: rcgen::Error) -> NetError {
    NetError::Identity(format!("cannot make a certificate: {e}"))
}

fn key_pair(der: &[u8]) -> Result<KeyPair, rcgen::Error> {
    KeyPair::from_pkcs8_der_and_sign_algo(&der.into(), &rcgen::PKCS_ECDSA_P256_SHA256)
}

/// All certificates of a PEM file, DER.
fn certificates(path: &Path) -> Result<Vec<Vec<u8>>, NetError> {
    parse_certificates(&private_file::read(path)?)
        .map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))
}

/// All certificates of PEM text, DER.
pub(crate) fn parse_certificates(
    text: &[u8],
) -> Result<Vec<Vec<u8>>, rustls_pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(text).map(|c| c.map(|c| c.to_vec())).collect()
}

/// The private key of a PEM file, DER.
fn private_key(path: &Path) -> Result<Vec<u8>, NetError> {
    PrivateKeyDer::from_pem_slice(&private_file::read(path)?)
        .map(|k| k.secret_der().to_vec())
        .map_err(|e| NetError::Identity(format!("{}: {e}", path.display())))
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out + &format!("-----END {label}-----\n")
}
