package grpcproxy

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"go.uber.org/zap"
)

// tlsFiles is a TLS configuration that follows the files it was made of: who rotates a certificate or a CA replaces the
// file, and connections that are made after that use it. A file that cannot be used changes nothing.
type tlsFiles struct {
	cert, key string
	cas       []string
	// others are trusted besides the CAs of files.
	others []*x509.Certificate

	mu      sync.Mutex
	cur     *tls.Config
	seen    []os.FileInfo // of what cur was made, nil if they may not be what they were any more
	refused string        // why the files, as they are, are not used
	rotated bool          // the client certificate was replaced at least once
	timer   *time.Timer
	stopped bool
}

// newTLSFiles finds the files in the settings. It returns nil if there are none. It has to be called before the
// configuration is made, which takes the settings of the CA away.
func newTLSFiles(ctx caddy.Context, t *reverseproxy.TLSConfig) (*tlsFiles, error) {
	f := &tlsFiles{cert: t.ClientCertificateFile, key: t.ClientCertificateKeyFile}
	//nolint:staticcheck // deprecated, but still there
	pems, ders := t.RootCAPEMFiles, t.RootCAPool
	f.cas = slices.Clone(pems)
	if len(pems) > 0 && len(ders) > 0 {
		raw, err := json.Marshal(caddytls.InlineCAPool{TrustedCACerts: ders})
		if err != nil {
			return nil, err
		}
		if err := f.addOther(ctx, "inline", raw); err != nil {
			return nil, err
		}
	}
	if len(t.CARaw) > 0 && hasFiles(t.CARaw) {
		if err := f.addSource(ctx, t.CARaw); err != nil {
			return nil, err
		}
	}
	if f.cert == "" && len(f.cas) == 0 {
		return nil, nil
	}
	return f, nil
}

// caSource is a module of tls.ca_pool.source, as far as it matters here.
type caSource struct {
	Provider string            `json:"provider"`
	PEMFiles []string          `json:"pem_files"`
	Sources  []json.RawMessage `json:"sources"`
}

// hasFiles tells whether the source of CAs is files, or is combined of sources among which there are some.
func hasFiles(raw json.RawMessage) bool {
	var s caSource
	if json.Unmarshal(raw, &s) != nil {
		return false // which loading it will say better
	}
	return s.Provider == "file" || s.Provider == "combined" && slices.ContainsFunc(s.Sources, hasFiles)
}

func (f *tlsFiles) addSource(ctx caddy.Context, raw json.RawMessage) error {
	var s caSource
	if err := json.Unmarshal(raw, &s); err != nil {
		return err
	}
	switch s.Provider {
	case "file":
		f.cas = append(f.cas, s.PEMFiles...)
		return nil
	case "combined":
		for _, raw := range s.Sources {
			if err := f.addSource(ctx, raw); err != nil {
				return err
			}
		}
		return nil
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return err
	}
	delete(fields, "provider")
	raw, err := json.Marshal(fields)
	if err != nil {
		return err
	}
	return f.addOther(ctx, s.Provider, raw)
}

// addOther adds the CAs of a source that is no file, as they are now.
func (f *tlsFiles) addOther(ctx caddy.Context, provider string, raw json.RawMessage) error {
	mod, err := ctx.LoadModuleByID("tls.ca_pool.source."+provider, raw)
	if err != nil {
		return err
	}
	if p, ok := mod.(caddytls.CertificateProvider); ok { // who is not, cannot be combined, which loading will say
		f.others = append(f.others, p.Certificates()...)
	}
	return nil
}

// settled is how old a file must be to be taken as written. Two writes within one tick of the file system's clock cannot be
// told apart by the time.
const settled = 2 * time.Second

// current is the configuration for a connection that is made now. It is the same pointer until something has changed.
func (f *tlsFiles) current(logger *zap.Logger) *tls.Config {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.currentLocked(logger)
}

func (f *tlsFiles) currentLocked(logger *zap.Logger) *tls.Config {
	now, old := f.stat()
	if now != nil && slices.EqualFunc(now, f.seen, unchanged) {
		return f.cur
	}
	next, err := f.load()
	if err != nil {
		if why := err.Error(); why != f.refused {
			f.refused = why
			logger.Error("files for TLS to upstreams have changed and cannot be used; what they had before stays in force", zap.Error(err))
		}
		return f.cur
	}
	f.refused, f.seen = "", nil
	if old {
		f.seen = now
	}
	if sameTLS(f.cur, next) {
		return f.cur
	}
	f.rotated = f.rotated || !sameCertificates(f.cur, next)
	f.cur = next
	logger.Info("files for TLS to upstreams have changed; new connections use them", zap.Strings("files", f.names()))
	return f.cur
}

func (f *tlsFiles) names() []string {
	var names []string
	if f.cert != "" {
		names = append(names, f.cert, f.key)
	}
	return append(names, f.cas...)
}

// stat returns nil if a file is not there. old tells that none was written just now.
func (f *tlsFiles) stat() (infos []os.FileInfo, old bool) {
	old = true
	for _, name := range f.names() {
		info, err := os.Stat(name)
		if err != nil {
			return nil, false
		}
		infos = append(infos, info)
		old = old && time.Since(info.ModTime()) > settled
	}
	return infos, old
}

func unchanged(a, b os.FileInfo) bool {
	return a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && os.SameFile(a, b)
}

// load reads the files.
func (f *tlsFiles) load() (*tls.Config, error) {
	cfg := f.cur.Clone()
	if f.cert != "" {
		cert, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s, key %s: %w", f.cert, f.key, err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	if len(f.cas) == 0 {
		return cfg, nil
	}
	pool := x509.NewCertPool()
	for _, c := range f.others {
		pool.AddCert(c)
	}
	for _, name := range f.cas {
		certs, err := readCAs(name)
		if err != nil {
			return nil, fmt.Errorf("CA file %s: %w", name, err)
		}
		for _, c := range certs {
			pool.AddCert(c)
		}
	}
	cfg.RootCAs = pool
	return cfg, nil
}

// readCAs reads a file of certificates in PEM. It refuses one that is being written: whose last block is not whole.
func readCAs(name string) ([]*x509.Certificate, error) {
	rest, err := os.ReadFile(name) //nolint:gosec // the configuration names it
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	switch {
	case bytes.Contains(rest, []byte("-----BEGIN")):
		return nil, errors.New("a block of PEM is not whole")
	case len(certs) == 0:
		return nil, errors.New("it has no certificate in PEM")
	}
	return certs, nil
}

const (
	// expiryNotice is how long before a client certificate expires the log warns.
	expiryNotice = 14 * 24 * time.Hour
	// expiryInterval is how often it is looked at.
	expiryInterval = 12 * time.Hour
)

// expiryTold are the client certificates that were warned of, in the life of the process.
var expiryTold sync.Map // of [sha256.Size]byte

// watchExpiry warns, now or in time, when the client certificate expires.
func (f *tlsFiles) watchExpiry(logger *zap.Logger) {
	if f == nil || f.cert == "" {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped {
		return
	}
	f.warnLocked(logger, f.currentLocked(logger))
	f.timer = time.AfterFunc(expiryInterval, func() { f.watchExpiry(logger) })
}

func (f *tlsFiles) warnLocked(logger *zap.Logger, cfg *tls.Config) {
	if len(cfg.Certificates) == 0 || len(cfg.Certificates[0].Certificate) == 0 {
		return
	}
	der := cfg.Certificates[0].Certificate[0]
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return // it could not have been loaded
	}
	notice := expiryNotice
	if life := leaf.NotAfter.Sub(leaf.NotBefore); f.rotated && life < 2*expiryNotice {
		notice = life / 4 // of a kind that lives shortly, and is replaced in time
	}
	left := time.Until(leaf.NotAfter)
	if left > notice {
		return
	}
	if _, told := expiryTold.LoadOrStore(sha256.Sum256(der), true); told {
		return
	}
	what := "the client certificate for upstreams expires soon; replace its files, which needs no reload"
	if left <= 0 {
		what = "the client certificate for upstreams has expired; replace its files, which needs no reload"
	}
	logger.Warn(what, zap.String("file", f.cert), zap.Time("expires", leaf.NotAfter), zap.String("subject", leaf.Subject.String()))
}

// stop ends watchExpiry. Connections of endpoints that live on still follow the files.
func (f *tlsFiles) stop() {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped = true
	if f.timer != nil {
		f.timer.Stop()
	}
}
