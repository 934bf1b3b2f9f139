package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// maxListSize bounds a list of endpoints in bytes, before it is parsed.
const maxListSize = 32 << 20

// parseList reads a list of endpoints from outside the configuration, in JSON or, if asked, in YAML. It is not trusted:
// it may not contain placeholders, which would read the environment and files.
func parseList(raw []byte, origin string, isYAML bool) ([]upstream.Endpoint, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		// Also what a file is for a moment that is being written in place.
		return nil, errors.New("the list is empty text; write [] where there are no endpoints")
	}
	split := splitJSON
	if isYAML {
		split = splitYAML
	}
	items, err := split(raw)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, len(items))
	where := func(i int) string { return fmt.Sprintf("line %d: entry %d", items[i].line, i+1) }
	for i, item := range items {
		if err := decodeStrictly(item.json, &entries[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", where(i), err)
		}
	}
	return endpointsOf(entries, origin, where)
}

// listItem is the JSON of one entry.
type listItem struct {
	json []byte
	line int
}

var errNotList = errors.New(`want a list of endpoints, [{"address": "host:port"}, ...]`)

func splitJSON(raw []byte) ([]listItem, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	fail := func(err error) error {
		at := d.InputOffset()
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = syntax.Offset
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err, at = errors.New("the list breaks off"), int64(len(raw))
		}
		return fmt.Errorf("line %d: %w", lineAt(raw, at), err)
	}
	switch token, err := d.Token(); {
	case err != nil:
		return nil, fail(err)
	case token != json.Delim('['):
		return nil, fail(errNotList)
	}
	var items []listItem
	line, counted := 1, int64(0)
	for d.More() {
		if len(items) == maxEndpoints {
			return nil, fail(fmt.Errorf("the list has more than %d entries", maxEndpoints))
		}
		var item json.RawMessage
		if err := d.Decode(&item); err != nil {
			return nil, fail(err)
		}
		begin := d.InputOffset() - int64(len(item))
		line += bytes.Count(raw[counted:begin], []byte{'\n'})
		counted = begin
		items = append(items, listItem{item, line})
	}
	if _, err := d.Token(); err != nil { // The closing bracket.
		return nil, fail(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fail(errors.New("something follows the list"))
	}
	return items, nil
}

func lineAt(raw []byte, at int64) int {
	return 1 + bytes.Count(raw[:min(max(at, 0), int64(len(raw)))], []byte{'\n'})
}

func splitYAML(raw []byte) ([]listItem, error) {
	d := yaml.NewDecoder(bytes.NewReader(raw))
	var doc yaml.Node
	if err := d.Decode(&doc); err != nil {
		if errors.Is(err, io.EOF) { // Nothing but comments.
			return nil, errNotList
		}
		return nil, plainYAML(err)
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.SequenceNode {
		return nil, fmt.Errorf("line %d: %w", doc.Line, errNotList)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the list")
	}
	nodes := doc.Content[0].Content
	if len(nodes) > maxEndpoints {
		return nil, fmt.Errorf("the list has more than %d entries", maxEndpoints)
	}
	items := make([]listItem, len(nodes))
	for i, node := range nodes {
		var v any
		err := node.Decode(&v)
		if err != nil {
			return nil, plainYAML(err)
		}
		items[i].line = node.Line
		if items[i].json, err = json.Marshal(v); err != nil {
			return nil, fmt.Errorf("line %d: entry %d: %w", node.Line, i+1, err)
		}
	}
	return items, nil
}

// plainYAML takes the parser's name off its errors, which give the line themselves.
func plainYAML(err error) error {
	return errors.New(strings.TrimPrefix(strings.Join(strings.Fields(err.Error()), " "), "yaml: "))
}

// decodeStrictly refuses what an entry does not have, since a misspelt weight is better refused than ignored.
func decodeStrictly(raw []byte, e *Entry) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	err := d.Decode(e)
	var wrong *json.UnmarshalTypeError
	switch {
	case err == nil && bytes.Equal(bytes.TrimSpace(raw), []byte("null")):
		return errors.New(`want an object, {"address": "host:port"}, not null`)
	case errors.As(err, &wrong) && wrong.Field == "":
		return fmt.Errorf(`want an object, {"address": "host:port"}, not a %s`, wrong.Value)
	case errors.As(err, &wrong):
		return fmt.Errorf("%s: want %s, not a %s", wrong.Field, wanted(wrong), wrong.Value)
	case err != nil:
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

func wanted(err *json.UnmarshalTypeError) string {
	switch k := err.Type.Kind().String(); k {
	case "string":
		return "a text in quotes"
	case "int":
		return "a whole number"
	default:
		return "an object"
	}
}
