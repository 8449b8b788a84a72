//! Certificate and key for HTTPS.

use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;

/// The protocol that a client asks for to speak HTTP/2.
pub(super) const H2: &[u8] = b"h2";

/// What a TLS handshake needs. `Debug` does not show the key.
#[derive(Clone)]
pub struct Tls(pub(super) TlsAcceptor);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// Why HTTPS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no {wanted} in PEM; found {found}")]
    Missing { path: PathBuf, wanted: &'static str, found: String },
    #[error("the private key in {0} is encrypted; write it in the clear with `openssl pkey -in FILE -out KEY`")]
    Encrypted(PathBuf),
    #[error("{path} is not sound PEM: {message}")]
    Pem { path: PathBuf, message: String },
    #[error("the private key in {key} does not belong to the first certificate in {cert}")]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("{cert} with {key} is of no use to TLS: {source}")]
    Unusable { cert: PathBuf, key: PathBuf, source: rustls::Error },
}

impl Tls {
    /// Reads a chain of PEM certificates, the server's own first, and its PEM private key (PKCS #8, PKCS #1 or SEC 1);
    /// both may be in the same file.
    ///
    /// # Errors
    /// A file that cannot be read or does not hold what it should, or a key that is not the certificate's.
    pub fn read(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let (chain, private) = (read_chain(cert)?, read_key(key)?);
        let unusable = |source| match source {
            rustls::Error::InconsistentKeys(_) => TlsError::Mismatch { cert: cert.into(), key: key.into() },
            source => TlsError::Unusable { cert: cert.into(), key: key.into(), source },
        };
        // Named, so that it does not depend on which providers other crates switch on.
        let versions = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let mut config = versions.with_no_client_auth().with_single_cert(chain, private).map_err(unusable)?;
        config.alpn_protocols = vec![H2.to_vec(), b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(path)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(|e| pem(path, &e))?;
    if chain.is_empty() {
        return Err(TlsError::Missing { path: path.into(), wanted: "certificate", found: labels(&bytes) });
    }
    Ok(chain)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(path)?;
    if let Some(key) = PrivateKeyDer::pem_slice_iter(&bytes).next() {
        return key.map_err(|e| pem(path, &e));
    }
    let found = labels(&bytes);
    if found.contains("ENCRYPTED") {
        return Err(TlsError::Encrypted(path.into()));
    }
    Err(TlsError::Missing { path: path.into(), wanted: "private key", found })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.into(), source })
}

fn pem(path: &Path, error: &rustls::pki_types::pem::Error) -> TlsError {
    TlsError::Pem { path: path.into(), message: error.to_string() }
}

/// What a PEM file says it holds.
fn labels(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let label = |line: &str| Some(line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----")?.to_string());
    let labels: Vec<String> = text.lines().filter_map(label).collect();
    match labels.len() {
        0 => format!("no PEM section in {} bytes", bytes.len()),
        _ => labels.join(", "),
    }
}
