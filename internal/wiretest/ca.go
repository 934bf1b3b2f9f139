package wiretest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority that lives as long as the test, made in memory.
type CA struct {
	// Pool holds the authority's certificate alone.
	Pool *x509.CertPool

	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a certificate authority.
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{Pool: x509.NewCertPool(), t: t}
	ca.key = newKey(t)
	template := newTemplate(t, "test authority")
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	ca.cert = sign(t, template, template, ca.key, ca.key)
	ca.Pool.AddCert(ca.cert)
	return ca
}

// ServerCert makes a server's certificate for names and IP addresses; without any, for localhost, 127.0.0.1 and ::1.
func (ca *CA) ServerCert(names ...string) tls.Certificate {
	ca.t.Helper()
	if len(names) == 0 {
		names = []string{"localhost", "127.0.0.1", "::1"}
	}
	return ca.issue(x509.ExtKeyUsageServerAuth, names[0], names)
}

// ClientCert makes a client's certificate with the common name and as many subject alternative names as are given.
func (ca *CA) ClientCert(commonName string, names ...string) tls.Certificate {
	ca.t.Helper()
	return ca.issue(x509.ExtKeyUsageClientAuth, commonName, names)
}

func (ca *CA) issue(usage x509.ExtKeyUsage, commonName string, names []string) tls.Certificate {
	ca.t.Helper()
	key := newKey(ca.t)
	template := newTemplate(ca.t, commonName)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{usage}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	leaf := sign(ca.t, template, ca.cert, key, ca.key)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// ServerConfig is the configuration of a server that speaks h2 with a ServerCert for the names.
func (ca *CA) ServerConfig(names ...string) *tls.Config {
	ca.t.Helper()
	return &tls.Config{
		Certificates: []tls.Certificate{ca.ServerCert(names...)}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12,
	}
}

// MutualConfig is ServerConfig for a server that demands a client's certificate from the authority.
func (ca *CA) MutualConfig(names ...string) *tls.Config {
	ca.t.Helper()
	cfg := ca.ServerConfig(names...)
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	cfg.ClientCAs = ca.Pool
	return cfg
}

// ClientConfig is the configuration of a client that speaks h2, trusts the authority and shows the certificates.
func (ca *CA) ClientConfig(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: ca.Pool, Certificates: certs, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12}
}

// PEM is the authority's certificate in PEM.
func (ca *CA) PEM() []byte { return certPEM(ca.cert.Raw) }

// File writes the authority's certificate to a file and returns its path.
func (ca *CA) File() string {
	ca.t.Helper()
	return writeFile(ca.t, "ca.pem", ca.PEM())
}

// PairFiles writes a certificate and its key to files and returns their paths.
func (ca *CA) PairFiles(cert tls.Certificate) (certFile, keyFile string) {
	ca.t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		ca.t.Fatal(err)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return writeFile(ca.t, "cert.pem", certPEM(cert.Certificate[0])), writeFile(ca.t, "key.pem", key)
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func writeFile(t testing.TB, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newTemplate(t testing.TB, commonName string) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
	}
}

func sign(t testing.TB, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
