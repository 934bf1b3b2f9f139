package grpcproxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// pair makes a certificate that lives from one time to another.
func pair(t *testing.T, name string, from, to time.Time) (der, certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// followed makes the configuration as Transport.config does.
func followed(t *testing.T, settings *reverseproxy.TLSConfig) *tlsFiles {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	f, err := newTLSFiles(ctx, settings)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := settings.MakeTLSClientConfig(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		f.cur = cfg
	}
	return f
}

func write(t *testing.T, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func trusts(cfg *tls.Config, der []byte) bool {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	_, err = c.Verify(x509.VerifyOptions{Roots: cfg.RootCAs, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

// A file is used as soon as it is whole, and not before: what was there stays in force meanwhile, and the log says it once.
func TestTLSFilesFollow(t *testing.T) {
	dir := t.TempDir()
	ca, cert, key := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	year := time.Now().AddDate(1, 0, 0)
	derA, pemA, keyA := pair(t, "a", time.Now(), year)
	derB, pemB, keyB := pair(t, "b", time.Now(), year)
	derC, _, _ := pair(t, "c", time.Now(), year)
	write(t, ca, pemA)
	write(t, cert, pemA)
	write(t, key, keyA)
	inline := base64.StdEncoding.EncodeToString(derC)
	for name, settings := range map[string]struct {
		raw    string
		others bool
	}{
		"file": {`{"provider": "file", "pem_files": ["` + ca + `"]}`, false},
		"combined": {
			`{"provider": "combined", "sources": [{"provider": "inline", "trusted_ca_certs": ["` + inline + `"]}, {"provider": "file", "pem_files": ["` + ca + `"]}]}`, true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			write(t, ca, pemA)
			write(t, cert, pemA)
			write(t, key, keyA)
			f := followed(t, &reverseproxy.TLSConfig{CARaw: json.RawMessage(settings.raw), ClientCertificateFile: cert, ClientCertificateKeyFile: key})
			core, logs := observer.New(zap.InfoLevel)
			logger := zap.New(core)
			first := f.cur
			is := func(what string, same bool, trusted, shown []byte, lines int) {
				t.Helper()
				before := f.current(logger)
				cfg := f.current(logger)
				if before != cfg || (cfg == first) != same {
					t.Errorf("%s: the configuration is another: %v, want %v", what, cfg != first, !same)
				}
				for _, der := range [][]byte{derA, derB} {
					if got, want := trusts(cfg, der), string(der) == string(trusted); got != want {
						t.Errorf("%s: trusted %v, want %v", what, got, want)
					}
				}
				if trusts(cfg, derC) != settings.others {
					t.Errorf("%s: the other source's is trusted: %v", what, !settings.others)
				}
				if got := cfg.Certificates[0].Certificate[0]; string(got) != string(shown) {
					t.Errorf("%s: another client certificate is shown", what)
				}
				if logs.Len() != lines {
					t.Errorf("%s: log %v, want %d lines", what, logs.All(), lines)
				}
			}
			is("nothing has changed", true, derA, derA, 0)
			write(t, ca, pemA)
			is("written again", true, derA, derA, 0)
			write(t, cert, pemB)
			is("the key is the other's", true, derA, derA, 1)
			write(t, key, keyB)
			is("now it fits", false, derA, derB, 2)
			write(t, ca, append(append([]byte(nil), pemA...), pemB[:len(pemB)/2]...))
			is("half a block", false, derA, derB, 3)
			if err := os.Remove(ca); err != nil {
				t.Fatal(err)
			}
			is("no file", false, derA, derB, 4)
			write(t, ca, nil)
			is("nothing in it", false, derA, derB, 5)
			write(t, ca, pemB)
			is("another CA", false, derB, derB, 6)
			// As Kubernetes does it: a link to another directory.
			if err := os.Rename(ca, ca+".real"); err != nil {
				t.Fatal(err)
			}
			write(t, ca+".other", pemA)
			if err := os.Symlink(ca+".other", ca); err != nil {
				t.Fatal(err)
			}
			is("a link", false, derA, derB, 7)
			if err := os.Remove(ca); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A file of the same size that was written within the same tick of the clock is read again, as long as it is young.
func TestTLSFilesSameTick(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	derA, pemA, _ := pair(t, "a", time.Now(), time.Now().AddDate(1, 0, 0))
	derB, pemB, _ := pair(t, "b", time.Now(), time.Now().AddDate(1, 0, 0))
	for len(pemA) != len(pemB) { // a signature's length varies
		derB, pemB, _ = pair(t, "b", time.Now(), time.Now().AddDate(1, 0, 0))
	}
	at := time.Now().Add(time.Hour) // young for as long as the test may take
	put := func(text []byte, at time.Time) {
		t.Helper()
		write(t, ca, text)
		if err := os.Chtimes(ca, at, at); err != nil {
			t.Fatal(err)
		}
	}
	put(pemA, at)
	f := followed(t, &reverseproxy.TLSConfig{CARaw: json.RawMessage(`{"provider": "file", "pem_files": ["` + ca + `"]}`)})
	if cfg := f.current(zap.NewNop()); !trusts(cfg, derA) {
		t.Error("the first is not trusted")
	}
	put(pemB, at)
	if cfg := f.current(zap.NewNop()); !trusts(cfg, derB) || trusts(cfg, derA) {
		t.Error("the second is not used")
	}
	// An old one is not read any more.
	put(pemB, at.Add(-2*time.Hour))
	f.current(zap.NewNop())
	put(pemA, at.Add(-2*time.Hour))
	if cfg := f.current(zap.NewNop()); !trusts(cfg, derB) {
		t.Error("an old file was read again")
	}
}

// Nothing is followed where there are no files.
func TestTLSFilesNone(t *testing.T) {
	for _, settings := range []*reverseproxy.TLSConfig{
		{}, {ServerName: "a"}, {ClientCertificateAutomate: "a"}, {CARaw: json.RawMessage(`{"provider": "system"}`)},
	} {
		ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
		if f, err := newTLSFiles(ctx, settings); f != nil || err != nil {
			t.Errorf("%+v: %v, %v", settings, f, err)
		}
		cancel()
	}
}

// "A line warns 14 days before a client certificate expires", once for each.
func TestTLSFilesExpiry(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Now()
	for _, tt := range []struct {
		name    string
		from    time.Duration
		left    time.Duration
		rotated bool
		warns   bool
	}{
		{"far", -day, 15 * day, false, false},
		{"near", -300 * day, 13 * day, false, true},
		{"expired", -300 * day, -day, false, true},
		{"short, not replaced so far", -day, 2 * day, false, true},
		{"short, replaced before", -day, 2 * day, true, false},
		{"short, late", -2 * day, 12 * time.Hour, true, true},
		{"long, replaced before", -300 * day, 13 * day, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
			_, certPEM, keyPEM := pair(t, tt.name, now.Add(tt.from), now.Add(tt.left))
			write(t, cert, certPEM)
			write(t, key, keyPEM)
			core, logs := observer.New(zap.WarnLevel)
			for range 3 { // as by reloads, and by several handlers
				f := followed(t, &reverseproxy.TLSConfig{ClientCertificateFile: cert, ClientCertificateKeyFile: key})
				f.rotated = tt.rotated
				f.watchExpiry(zap.New(core))
				f.watchExpiry(zap.New(core))
				f.stop()
			}
			want := 0
			if tt.warns {
				want = 1
			}
			if logs.Len() != want {
				t.Fatalf("log %v, want %d lines", logs.All(), want)
			}
			if tt.warns && logs.All()[0].ContextMap()["file"] != cert {
				t.Errorf("the line does not name the file: %v", logs.All()[0])
			}
		})
	}
	new(tlsFiles).watchExpiry(zap.NewNop()) // without a client certificate
	(*tlsFiles)(nil).watchExpiry(zap.NewNop())
	(*tlsFiles)(nil).stop()
}
