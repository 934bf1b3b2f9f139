package discovery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(File)) }

// defaultFileRefresh is short, since looking costs one system call while nothing changes.
const defaultFileRefresh = time.Second

// File reads the endpoints from a file, a list in JSON or YAML whose entries have the fields of `static`:
//
//	[{"address": "10.0.0.1:50051", "weight": 2}, {"address": "10.0.0.2:50051"}]
//
// The file is looked at every second, and read when it changed, be it written, replaced by renaming another over it, or
// behind a symbolic link that was changed (a mounted Kubernetes ConfigMap). To be safe from lists that are read
// half-written, replace the file by renaming. While the file is missing or malformed, the last list stays in force.
type File struct {
	// The path of the file. Names that end with `.json` are JSON, with `.yaml` or `.yml` YAML; others are JSON if they
	// begin with a bracket. Placeholders are resolved when the configuration is loaded. Required.
	Path string `json:"path,omitempty"`

	// How often to look at the file. Default: `1s`.
	Refresh caddy.Duration `json:"refresh,omitempty"`

	path string
}

// CaddyModule returns the Caddy module information.
func (*File) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "file", New: func() caddy.Module { return new(File) }}
}

// UnmarshalCaddyfile reads the source from the Caddyfile:
//
//	dynamic file <path> {
//	    refresh <duration>
//	}
func (f *File) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	w := words{d}
	d.Next() // The source's name.
	if err := w.text(&f.Path); err != nil {
		return err
	}
	for d.NextBlock(0) {
		if d.Val() != "refresh" {
			return d.Errf("unrecognized subdirective %q; expected refresh", d.Val())
		}
		if err := w.duration(&f.Refresh); err != nil {
			return err
		}
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (f *File) Provision(caddy.Context) (err error) {
	if f.path, err = upstream.Resolve(f.Path); err != nil {
		return fmt.Errorf("path %w", err)
	}
	if f.path == "" {
		return errors.New("path is missing; write the path of the file with the list of endpoints")
	}
	if f.Refresh == 0 {
		f.Refresh = caddy.Duration(defaultFileRefresh)
	}
	return checkRefresh(f.Refresh)
}

// Watch implements [Source]. It looks at the file instead of asking the system to tell of changes: that works with
// network file systems and mounts, too, and cannot miss that the directory itself was replaced.
func (f *File) Watch(ctx context.Context, sink Sink) {
	w := fileWatch{path: f.path, refresh: time.Duration(f.Refresh)}
	poll(ctx, sink, nil, w.look)
}

// fileWatch remembers what was seen of a file.
type fileWatch struct {
	path    string
	refresh time.Duration
	seen    os.FileInfo // When it was last read; nil if it could not be.
	read    time.Time   // When that was.
	failure string      // The last error, which is told once.
}

func (w *fileWatch) look(_ context.Context, r *reporter) (time.Duration, error) {
	info, err := os.Stat(w.path)
	if err == nil && w.unchanged(info) {
		return w.refresh, nil
	}
	w.seen, w.read = info, time.Now()
	var list []upstream.Endpoint
	if err == nil {
		list, err = w.list(info)
	}
	if err != nil {
		if w.failure == err.Error() {
			return w.refresh, nil
		}
		w.failure = err.Error()
		return w.refresh, err
	}
	w.failure = ""
	r.update(list)
	return w.refresh, nil
}

// coarse is more than the steps in which file systems tell the time.
const coarse = 2 * time.Second

// unchanged tells whether the file is what was read. A file that was young when it was read may have been written again
// within the same tick of its clock, so it is read again.
func (w *fileWatch) unchanged(info os.FileInfo) bool {
	return w.seen != nil && os.SameFile(w.seen, info) && w.seen.Size() == info.Size() && w.seen.ModTime().Equal(info.ModTime()) &&
		w.read.Sub(info.ModTime()) > coarse
}

func (w *fileWatch) list(info os.FileInfo) ([]upstream.Endpoint, error) {
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", w.path)
	}
	f, err := os.Open(w.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxListSize+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxListSize {
		return nil, fmt.Errorf("%s is larger than %d MiB", w.path, maxListSize>>20)
	}
	list, err := parseList(raw, "file://"+w.path, isYAML(w.path, raw))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.path, err)
	}
	return list, nil
}

func isYAML(path string, raw []byte) bool {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".json":
		return false
	case ".yaml", ".yml":
		return true
	}
	return !bytes.HasPrefix(bytes.TrimSpace(raw), []byte("["))
}

var (
	_ Source                = (*File)(nil)
	_ caddy.Provisioner     = (*File)(nil)
	_ caddyfile.Unmarshaler = (*File)(nil)
)
